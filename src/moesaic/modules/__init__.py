"""`nn.Module` replacements that run on packed weights, and native forwards of whole blocks.

They know the structure that the modules of the model library have, and neither checkpoints nor plans.
"""

from moesaic.modules.attention import ATTENTION_NAME, keep_stock_attention, register_attention
from moesaic.modules.decoder import DecoderLayerForward, SharedState, take_over_mla
from moesaic.modules.delta_net import is_delta_net
from moesaic.modules.embedding import PackedEmbedding
from moesaic.modules.experts import RoutedExperts, activation_of
from moesaic.modules.families import FAMILIES, Family
from moesaic.modules.linear import PackedLinear
from moesaic.modules.mla import SPLIT_KV_B
from moesaic.modules.norm import RMSNorm
from moesaic.modules.rotary import RotaryAngles
from moesaic.modules.stack import LayerStack

__all__ = [
    "ATTENTION_NAME",
    "FAMILIES",
    "SPLIT_KV_B",
    "DecoderLayerForward",
    "Family",
    "LayerStack",
    "PackedEmbedding",
    "PackedLinear",
    "RMSNorm",
    "RotaryAngles",
    "RoutedExperts",
    "SharedState",
    "activation_of",
    "is_delta_net",
    "keep_stock_attention",
    "register_attention",
    "take_over_mla",
]

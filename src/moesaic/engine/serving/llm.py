"""`moesaic.LLM`: many prompts at once, from a script.

It runs an engine in the calling thread, step by step, until all answers are there. It knows no event loop.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from itertools import count
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from moesaic.engine.packing import Progress
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.outputs import Completion, RequestOutput
from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.engine.serving.start import ServingOptions, make_engine
from moesaic.engine.serving.text import encode_text
from moesaic.errors import EngineDeadError, RequestError
from moesaic.placement import Plan, Rules

if TYPE_CHECKING:
    from moesaic.engine.serving.grammar import CompiledGrammar, GrammarVocabulary

__all__ = ["LLM"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model that answers many prompts together; a context manager.

    Args:
        model: `demo`, a folder with safetensors, a `.gguf`, `org/name` or `org/name:QUANT` on the hub.
        gguf: a GGUF to take the weights and the configuration from instead.
        tokenizer: a folder with tokenizer files to use instead of the model's.
        plan: a template's name (auto, cpu, hybrid, layers, gpu), a placement file, rules, or a plan.
        vram: memory of the GPU to use at most, in bytes or as in "24GiB"; what is free, less a margin, if None.
        context: most tokens of prompt and answer together; the model's, or what fits, if None.
        max_batch: most answers at once.
        kv_cache: bytes of the cache on the CPU; a quarter of what is free if None.
        prefix_cache: whether beginnings that were computed are kept for later prompts.
        threads: of the kernels; None takes MOESAIC_THREADS or the physical cores.
        offline: take from the hub only what is on this computer.
        expert_profile: a file from an earlier run, with whose busiest experts the cache of experts on a GPU begins.
        save_expert_profile: file to which `close` writes how often each expert was chosen.
        defer_experts: so many experts of each token arrive one layer late in decode on a GPU with experts on the CPU.
        progress: of the load: True draws a bar, False is silent, a function is called with (bytes done, bytes in all).

    Raises:
        MoesaicError: the model cannot be found, read, placed or run; see `moesaic.errors`.
    """

    def __init__(
        self,
        model: str,
        *,
        gguf: str | Path | None = None,
        tokenizer: str | Path | None = None,
        plan: str | Path | Rules | Plan = "auto",
        vram: int | str | None = None,
        context: int | None = None,
        max_batch: int = 64,
        kv_cache: int | None = None,
        prefix_cache: bool = True,
        threads: int | None = None,
        offline: bool = False,
        expert_profile: str | Path | None = None,
        save_expert_profile: str | Path | None = None,
        defer_experts: int = 0,
        progress: Progress = True,
    ) -> None:
        options = ServingOptions(
            gguf=gguf,
            tokenizer=tokenizer,
            plan=plan,
            vram=vram,
            context=context,
            threads=threads,
            offline=offline,
            kv_cache=kv_cache,
            max_batch=max_batch,
            prefix_cache=prefix_cache,
            expert_profile=expert_profile,
            save_expert_profile=save_expert_profile,
            defer_experts=defer_experts,
        )
        self._engine: Engine | None = make_engine(model, options, progress)
        self._numbers = count()
        self._vocabulary: GrammarVocabulary | None = None

    @property
    def engine(self) -> Engine:
        """What computes; EngineDeadError after `close`."""
        if self._engine is None:
            raise EngineDeadError("the model was closed: load it again.")
        return self._engine

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Go on with prompts.

        Args:
            prompts: a text, token ids, or several of these. Texts get the tokenizer's own special tokens around them.
            params: how they are answered; one for all or one for each.
            progress: draw a bar.

        Returns:
            An output for each prompt, in their order.

        Raises:
            RequestError: a prompt or a parameter cannot be used; nothing was computed.
        """
        return self._run([self._encode(prompt) for prompt in _several(prompts)], params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Args:
            messages: a conversation, or several: messages with "role" and "content".
            params: how they are answered; one for all or one for each.
            tools: what the model may call, as its chat template takes it.
            progress: draw a bar.
            template: further variables of the chat template, such as `enable_thinking`.

        Returns:
            An output for each conversation, in their order; what the model writes of thoughts and calls is text. Names
            of special tokens in messages become these tokens, as in transformers; the server takes them as text.

        Raises:
            RequestError: the chat template refuses a conversation, or as `generate`.
        """
        one = not messages or isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        return self._run([self._encode_chat(each, tools, template) for each in conversations], params, progress)

    def close(self) -> None:
        """Give the memory of the cache and the model back."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None, progress: bool
    ) -> list[RequestOutput]:
        engine = self.engine
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} SamplingParams for {len(prompts)} prompts: expected one for each.")
        for ids, own in zip(prompts, each, strict=True):
            engine.check(ids, own)
        grammars = {own.grammar for own in each if own.grammar is not None}
        compiled = {grammar: self._compile(grammar) for grammar in grammars}
        outputs: dict[str, RequestOutput] = {}
        try:
            for ids, own in zip(prompts, each, strict=True):
                name = str(next(self._numbers))
                matchers = [] if own.grammar is None else [compiled[own.grammar].matcher() for _ in range(own.n)]
                engine.add(name, ids, own, matchers)
                outputs[name] = RequestOutput(name, ids, [Completion(index) for index in range(own.n)])
            self._finish(engine, outputs, progress)
        finally:
            for name in outputs:  # after an error, or ^C
                engine.cancel(name)
        return list(outputs.values())

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        from moesaic.engine.serving.grammar import compile_grammar  # what it needs is needed for nothing else
        from moesaic.engine.serving.grammar_checks import check_grammar

        if self._vocabulary is None:
            self._vocabulary = self.engine.grammar_vocabulary()
        check_grammar(grammar)
        return compile_grammar(grammar, self._vocabulary)

    def _finish(self, engine: Engine, outputs: dict[str, RequestOutput], progress: bool) -> None:
        total = sum(len(output.completions) for output in outputs.values())
        with engine.running(), tqdm(total=total, desc="Answers", disable=not progress) as bar:
            while engine.has_work:
                for name, chunk in engine.step():
                    if name not in outputs:  # of a call that was interrupted
                        continue
                    outputs[name].completions[chunk.index].add(chunk)
                    bar.update(chunk.finish_reason is not None)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return encode_text(self.tokenizer, prompt)
        prompt = _listed(prompt)
        if not isinstance(prompt, Sequence) or not all(isinstance(token, Integral) for token in prompt):
            raise RequestError(f"a prompt is {reprlib.repr(prompt)}: expected a text, or numbers of tokens.", "prompt")
        return [int(token) for token in prompt]

    def _encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, template: Mapping[str, Any]
    ) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RequestError("this model's tokenizer has no chat template: use generate().", "messages")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=True,
                **template,
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise RequestError(f"the chat template refuses this conversation: {error}", "messages") from error
        return encode_text(self.tokenizer, text, add_special_tokens=False)


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists, everything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    prompts = _listed(prompts)
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is {reprlib.repr(prompts)}: expected a text, token ids, or several of these.")
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return cast(Sequence[Prompt], [prompts] if one else prompts)

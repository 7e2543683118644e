"""The demo model behind the engine: everybody gets the text that he would get alone."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import moesaic
from moesaic import LLM, SamplingParams
from moesaic.engine.answer import Sampling
from moesaic.engine.auto import AutoModelForCausalLM, AutoTokenizer
from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.paged_runner import PagedRunner
from moesaic.engine.serving.params import Grammar
from moesaic.engine.serving.solo_runner import SoloRunner
from moesaic.engine.session import Session
from moesaic.errors import ConfigError, EngineDeadError, RequestError

GREEDY = SamplingParams(max_tokens=60, temperature=0)


def canaries(number: int, count: int = 4) -> list[int]:
    """Numbers that no other prompt has."""
    rng = np.random.default_rng(number)
    return [int(each) for each in 100 * rng.permutation(9)[:count] + 100 + number]


def question(number: int) -> str:
    return "Sort: " + ", ".join(map(str, canaries(number)))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", plan="cpu", progress=False) as loaded:
        yield loaded


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm._encode_chat([{"role": "user", "content": text}], None, {})


def ask(llm: LLM, text: str, params: SamplingParams = GREEDY) -> Completion:
    return llm.chat([{"role": "user", "content": text}], params)[0].completions[0]


def test_64_requests_at_once_get_the_text_that_each_gets_alone(llm: LLM) -> None:
    assert isinstance(llm.engine.runner, PagedRunner)
    alone = [ask(llm, question(number)).text for number in range(64)]
    outputs = llm.chat([[{"role": "user", "content": question(number)}] for number in range(64)], GREEDY)
    assert [output.completions[0].text for output in outputs] == alone
    right = [", ".join(map(str, sorted(canaries(number)))) in text for number, text in enumerate(alone)]
    assert sum(right) >= 60


@pytest.mark.usefixtures("three_threads")
def test_streams_of_an_event_loop_get_the_same_text(llm: LLM) -> None:
    alone = [ask(llm, question(number)).text for number in range(8)]

    async def main() -> None:
        engine = AsyncEngine(lambda: llm.engine, warm_grammars=True)
        engine.start()
        await engine.wait_ready()

        async def stream(number: int) -> str:
            pieces = [chunk async for chunk in engine.generate(ids_of(llm, question(number)), GREEDY)]
            assert pieces[-1].finish_reason == "stop"
            return "".join(piece.text for piece in pieces)

        assert await asyncio.gather(*map(stream, range(8))) == alone
        json_only = SamplingParams(max_tokens=4, temperature=0, grammar=Grammar("regex", r"[0-9]{3}"), n=2)
        texts = [Completion(0), Completion(1)]
        async for chunk in engine.generate(ids_of(llm, question(1)), json_only):
            texts[chunk.index].add(chunk)
        assert all(json.loads(each.text) in range(1000) and each.finish_reason == "stop" for each in texts)
        with pytest.raises(RequestError):
            async for _ in engine.generate([1], SamplingParams(grammar=Grammar("regex", "("))):
                pass
        close, llm.engine.close = llm.engine.close, lambda: None  # type: ignore[method-assign]
        await engine.close()
        llm.engine.close = close  # type: ignore[method-assign]

    asyncio.run(main())


def test_a_common_beginning_is_computed_once(llm: LLM) -> None:
    numbers = ", ".join(str(number) for number in np.random.default_rng(0).integers(0, 1000, 60))
    first = ask(llm, f"Sort: {numbers}")
    again = ask(llm, f"Sort: {numbers}")
    assert first.stats.cached_tokens == 0
    assert again.stats.cached_tokens == (first.stats.prompt_tokens - 1) // 64 * 64 >= 64
    assert again.text == first.text
    other = ask(llm, f"Sort: {numbers}, 5")
    assert other.stats.cached_tokens >= 64
    three = llm.chat([{"role": "user", "content": f"Sort: {numbers}"}], SamplingParams(3, 60, temperature=0))[0]
    assert [each.text for each in three.completions] == [first.text] * 3


def test_a_tiny_cache_takes_turns_and_changes_nothing(llm: LLM) -> None:
    texts = [f"Sort: {', '.join(map(str, canaries(number, 9) * 2))}" for number in range(6)]
    params = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
    prompts, found = [ids_of(llm, text) for text in texts], []
    for num_blocks in (64, 7):
        # What is computed anew is one prompt: the same to the bit where no form depends on how long it is.
        runner = PagedRunner(llm.engine.runner.decoder, num_blocks, independent="all")  # type: ignore[attr-defined]
        engine = Engine(runner, llm.tokenizer, llm.engine.defaults)
        found.append(_run(engine, prompts, params))
        assert (engine.stats().preemptions > 0) == (num_blocks == 7)
    assert found[0] == found[1]


def _run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for index, ids in enumerate(prompts):
        engine.add(str(index), ids, params)
    while engine.has_work:
        for name, chunk in engine.step():
            found[int(name)] += chunk.token_ids
    return found


@pytest.mark.parametrize("kind", ["fused", "stock"])
def test_models_without_a_paged_cache_are_served_too(llm: LLM, kind: str) -> None:
    """The same weights one sequence at a time, on fused layers or on those of the model library."""
    model = AutoModelForCausalLM.from_pretrained("demo", plan="cpu", progress=False)
    tokenizer = AutoTokenizer.from_pretrained("demo")
    session, asked = Session(model, tokenizer), Sampling(max_tokens=20, temperature=0)
    if kind == "stock":
        model.set_attn_implementation("eager")
    prompts = [ids_of(llm, question(number)) for number in range(4)]
    wanted = [session.answer(ids, asked).text for ids in prompts]
    engine = Engine(SoloRunner(model, 64), tokenizer, GenerationDefaults.of(model.generation_config, tokenizer))
    found = _run(engine, prompts, SamplingParams(max_tokens=20, temperature=0))
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in found] == wanted
    assert engine.stats().blocks_free == 64


def test_prompts_parameters_and_outputs(llm: LLM) -> None:
    ids = ids_of(llm, "Hi")
    one, two = llm.generate(["Sort: 3, 1", ids], [GREEDY, SamplingParams(max_tokens=2, temperature=0, logprobs=2)])
    assert one.prompt_token_ids == llm.tokenizer("Sort: 3, 1")["input_ids"]
    assert two.prompt_token_ids == ids
    completion = two.completions[0]
    assert (completion.finish_reason, len(completion.token_ids), len(completion.logprobs)) == ("length", 2, 2)
    assert [len(each.top) for each in completion.logprobs] == [2, 2]
    assert completion.token_ids == [each.token_id for each in completion.logprobs]
    assert [output.prompt_token_ids for output in llm.generate(ids, GREEDY)] == [ids]
    assert ask(llm, question(2), SamplingParams(temperature=0, stop=("0",))).stop == "0"
    drawn = [ask(llm, "Hi", SamplingParams(temperature=2, seed=7, max_tokens=9)) for _ in range(2)]
    assert drawn[0].token_ids == drawn[1].token_ids
    assert drawn[0].stats.seed == 7
    assert ask(llm, question(2), SamplingParams(temperature=0, stop="602")).stop == "602"  # not one of its characters
    assert [output.prompt_token_ids for output in llm.generate(torch.tensor([ids, ids]), GREEDY)] == [ids, ids]
    assert [output.prompt_token_ids for output in llm.generate(np.array(ids), GREEDY)] == [ids]
    assert llm.generate([]) == []
    for prompts, params, message in (
        ([ids, []], GREEDY, "empty"),
        ([ids], [GREEDY, GREEDY], "2 SamplingParams for 1 prompts"),
        ([[1] * 9000], GREEDY, "the prompt is too long: it has 9000 tokens, .*context length is 8192 tokens"),
        (["x\ud800"], GREEDY, r"U\+D800 at position 1"),
        ([[1.5]], GREEDY, "numbers of tokens"),
        ([None], GREEDY, "None: expected a text"),
        (7, GREEDY, "prompts is 7"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, params)
        assert not llm.engine.has_work


def test_a_closed_model_gives_its_memory_back() -> None:
    llm = moesaic.LLM("demo", plan="cpu", progress=False, max_batch=2, kv_cache=4 << 20, context=500)
    facts = llm.engine.facts
    assert facts is not None
    assert (facts.path, facts.family, facts.container, facts.format) == ("demo", "deepseek_v3", "gguf", "Q4_K")
    assert facts.nbytes > 10_000_000
    assert llm.engine.context_length == 500
    assert len(ask(llm, question(1)).text) > 5
    runner = llm.engine.runner
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError):
        llm.generate("Hi")
    gc.collect()
    assert runner._layers is None  # type: ignore[attr-defined]


def test_a_cache_that_is_smaller_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds 256 tokens, but the context is to be 500"):
        LLM("demo", plan="cpu", progress=False, kv_cache=1 << 20, context=500)


def test_factories_share_their_options() -> None:
    from moesaic.engine.serving.start import ServingOptions, make_engine

    engine = make_engine("demo", ServingOptions(plan="cpu", prefix_cache=False, max_batch=3, threads=1), progress=False)
    assert engine.tokenizer.chat_template
    assert engine.runner.max_batch == 3
    assert engine.defaults.stop_ids == {1}
    engine.close()

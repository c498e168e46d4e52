"""A model has many users at once: whatever decodes or learns with it leaves the others alone, and it as it was."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paperworks.decoding import (
    ClassifierFreeGuidance,
    ConditionalBeamSearch,
    Drafter,
    DynamicInference,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    HiddenStateOptimization,
    RecursiveSpeculation,
    SuperposedDecoding,
    Target,
    TemporalFusion,
    TreeCache,
    as_custom_generate,
    collect,
    exact_mode,
    fit_tree,
    generate,
    stream,
    train_drafter,
)
from paperworks.decoding.layer_exit import Action
from tests.decoding.conftest import DRAFTERS, make_model, scramble

ONE, OTHER = torch.tensor([[3, 1, 2, 0, 2]]), torch.tensor([[9, 8, 7], [4, 5, 6]])


def drafting(name: str) -> Callable[[Any], Callable[[torch.Tensor], Any]]:
    def prepared(model: Any) -> Callable[[torch.Tensor], Any]:
        drafter = scramble(DRAFTERS[name](model))

        def call(ids: torch.Tensor) -> Any:
            result = generate(model, ids, drafter=drafter, max_new_tokens=10, eos_token_id=[])
            # Drafts depend on the states that were seen, though the text does not.
            return result.new_tokens, result.statistics.emitted, result.statistics.drafted

        return call

    return prepared


def guided(model: Any) -> Callable[[torch.Tensor], Any]:
    def call(ids: torch.Tensor) -> Any:
        steered = ClassifierFreeGuidance(model, condition=[0, 1], null=2, scale=2.0)
        return generate(steered, ids, max_new_tokens=6, eos_token_id=[]).new_tokens

    return call


def beam_search(model: Any) -> Callable[[torch.Tensor], Any]:
    def classifier(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(hidden.sum(-1))

    search = ConditionalBeamSearch(model, classifier, num_beams=3)

    def call(ids: torch.Tensor) -> Any:
        found = search.generate(ids, max_new_tokens=6, eos_token_id=0)
        return found.new_tokens, found.scores.tolist()

    return call


def dynamic(model: Any) -> Callable[[torch.Tensor], Any]:
    heads = DynamicInference(model)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))

    def call(ids: torch.Tensor) -> Any:
        texts = [heads.generate(row[None], policy=lambda layer, hidden: Action.EXIT if float(hidden[0, 0, 0]) > 0
                                else Action.CONTINUE, eos_token_id=[]) for row in ids]  # fmt: skip
        return [(text.new_tokens, text.exit_layers) for text in texts], heads.read(ids).predictions.tolist()

    return call


def served(model: Any) -> Callable[[torch.Tensor], Any]:
    def call(ids: torch.Tensor) -> Any:
        with TemporalFusion(model, max_concurrency=2, max_seq_len=32) as server:
            handles = [server.submit(row, max_new_tokens=8, eos_token_id=[]) for row in ids]
            return [handle.result(timeout=60) for handle in handles]

    return call


METHODS: dict[str, Callable[[Any], Callable[[torch.Tensor], Any]]] = {
    "transformers": lambda model: lambda ids: model.generate(ids, max_new_tokens=10, do_sample=False).tolist(),
    "custom_generate": lambda model: lambda ids: model.generate(
        ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.3, custom_generate=as_custom_generate()).tolist(),
    **{name: drafting(name) for name in DRAFTERS},
    "guidance": guided,
    "beam search": beam_search,
    "mode": lambda model: lambda ids: exact_mode(model, ids[:1], max_new_tokens=4, eos_token_id=0, max_calls=20),
    "dynamic": dynamic,
    "fusion": served,
    "superposed": lambda model: lambda ids: SuperposedDecoding(model, drafts=2, top_tokens=6)
    .generate(ids, max_new_tokens=5, eos_token_id=[]).scores.tolist(),
    "entropy-adaptive": lambda model: lambda ids: EntropyAdaptiveDecoding(
        model, model, EntropySwitch(1.0, min_stay=1)).generate(ids[:1], max_new_tokens=8, eos_token_id=[]).entropies,
    "hidden states": lambda model: lambda ids: HiddenStateOptimization(model, window=4, learning_rate=0.05)
    .log_likelihood(ids).tolist(),
    "collect": lambda model: lambda ids: collect(model, [([], row.tolist()) for row in ids]).hidden.tolist(),
}  # fmt: skip


class Meeting:
    """Lets the passes of two threads through a layer in pairs, so that they are under way at the same time."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.barrier, self.here, self.met = threading.Barrier(2), 2, 0
        layer.register_forward_pre_hook(self.meet)

    def meet(self, *args: Any) -> None:
        if self.here < 2:
            return
        try:
            self.barrier.wait(timeout=5)
            self.met += 1
        except threading.BrokenBarrierError:
            self.barrier.reset()

    def leave(self) -> None:
        self.here -= 1
        self.barrier.abort()


def together(calls: list[Callable[[], Any]], meeting: Meeting) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error
        finally:
            meeting.leave()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("beside", ["transformers", "itself"])
@pytest.mark.parametrize("name", METHODS)
def test_two_threads_with_one_model_get_what_each_gets_alone(name, beside):
    model = make_model()
    mine = METHODS[name](model)
    theirs = mine if beside == "itself" else METHODS[beside](model)
    alone = [mine(ONE), theirs(OTHER)]
    meeting = Meeting(model.model.layers[0])
    assert together([lambda: mine(ONE), lambda: theirs(OTHER)], meeting) == alone
    assert meeting.met


def state_of(model: torch.nn.Module) -> Any:
    """Hooks and patches of all modules, and all that a call could leave in them."""
    return [
        (name, {key: (list(value.items()) if "hooks" in key or key in ("_modules", "_parameters", "_buffers") else value)
                for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_call_leaves_the_model_as_it_was(name):
    model = make_model()
    # transformers marks a model at its first pass.
    model.generate(ONE, max_new_tokens=2)
    before = state_of(model)
    call = METHODS[name](model)
    assert state_of(model) == before
    call(OTHER)
    assert state_of(model) == before


def test_what_waits_for_its_next_step_sees_nothing_of_the_model():
    """A living target, a server and a stream between two tokens gather nothing, and keep nothing alive."""
    model = make_model()
    before = state_of(model)
    target, server = Target(model), TemporalFusion(model, max_concurrency=2, max_seq_len=32)
    handle = server.submit(ONE, max_new_tokens=8, eos_token_id=[])
    server.step()
    steps = stream(model, ONE, drafter=scramble(DRAFTERS["hydra"](model)), max_new_tokens=8, eos_token_id=[])
    next(steps)
    assert state_of(model) == before
    seen = []
    with model.model.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output[0]))):
        model(OTHER)
    gc.collect()
    assert seen[0]() is None
    texts = handle.result(), [token for step in steps for token in step[0]]
    assert texts[0][1:] == texts[1]
    del target, server, handle, steps
    gc.collect()
    assert state_of(model) == before


def test_streams_of_one_thread_take_turns():
    model = make_model()
    drafters = [scramble(DRAFTERS[name](model)) for name in ("hydra++", "fspad")]
    prompts = [ONE, OTHER]
    alone = [generate(model, ids, drafter=drafter, max_new_tokens=12, eos_token_id=[])
             for ids, drafter in zip(prompts, drafters, strict=True)]  # fmt: skip
    streams = [stream(model, ids, drafter=drafter, max_new_tokens=12, eos_token_id=[])
               for ids, drafter in zip(prompts, drafters, strict=True)]  # fmt: skip
    texts: list[list[list[int]]] = [[[]], [[], []]]
    going = [0, 1]
    while going:
        for index in going[:]:
            if (step := next(streams[index], None)) is None:
                going.remove(index)
                continue
            for text, tokens in zip(texts[index], step, strict=True):
                text += tokens
            model.generate(OTHER, max_new_tokens=1)
    assert texts == [result.new_tokens for result in alone]


def test_a_pass_that_fails_leaves_no_hook():
    model = make_model()
    before = state_of(model)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with model.model.layers[1].register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        Target(model).prefill([ONE[0]], TreeCache(model.config, 1))
    with model.model.layers[1].register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        DynamicInference(model).read(ONE)
    assert state_of(model) == before


def test_a_patch_of_the_base_models_forward_does_not_keep_layers_from_being_left():
    """As accelerate puts one around each module of a model on several devices."""
    model = make_model()
    alone = dynamic(model)(ONE)
    for module in (model, model.model, *model.model.layers):
        own = module.forward
        module.forward = functools.wraps(own)(lambda *args, own=own, **kwargs: own(*args, **kwargs))
    before = state_of(model)
    assert dynamic(model)(ONE) == alone
    assert state_of(model) == before


# States left behind


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_loaded_drafter_is_ready_to_draft(name, tmp_path):
    model = make_model()
    drafter = scramble(DRAFTERS[name](model))
    drafter.save_pretrained(tmp_path)
    loaded = Drafter.from_pretrained(tmp_path, model)
    assert not any(module.training for module in loaded.modules())


def test_the_tree_fitted_to_a_loaded_drafter_is_that_of_the_one_saved(tmp_path):
    model = make_model()
    texts = generate(model, torch.randint(40, (12, 3), generator=torch.Generator().manual_seed(0)), max_new_tokens=24,
                     eos_token_id=[]).new_tokens  # fmt: skip
    data = collect(model, [([], text) for text in texts])
    drafter = scramble(DRAFTERS["chimera"](model))
    drafter.save_pretrained(tmp_path)
    loaded = Drafter.from_pretrained(tmp_path, model)
    accuracies = [fit_tree(one, model, data, nodes=6, ranks=4, greedy=False) for one in (drafter, loaded)]
    assert torch.equal(*accuracies)
    # It is the mode that makes the difference here.
    assert not torch.equal(fit_tree(loaded.train(), model, data, nodes=6, ranks=4, greedy=False), accuracies[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["rsd-s", "hydra++", "chimera", "fspad"])
def test_training_that_breaks_off_leaves_drafter_and_models_as_they_were(name, error):
    model = make_model(dtype=torch.bfloat16)
    own = make_model(dtype=torch.bfloat16)
    drafter = DRAFTERS[name](model).to(torch.bfloat16).eval()
    if name == "rsd-s":
        drafter = RecursiveSpeculation.from_target(model, draft=own)
    data = collect(model, [([], [*row.tolist(), *range(8)]) for row in OTHER])
    before = state_of(model)
    steps = []

    def progress(step: int) -> None:
        assert drafter.training and next(drafter.parameters()).dtype == torch.float32
        steps.append(step)
        if len(steps) == 2:
            raise error

    with pytest.raises(error):
        train_drafter(drafter, model, data, epochs=5, batch_size=1, progress=progress)
    assert len(steps) == 2 and state_of(model) == before
    for module in (*drafter.modules(), *own.modules(), *model.modules()):
        assert not module.training
    for parameter in (*drafter.parameters(), *own.parameters(), *model.parameters()):
        assert parameter.dtype == torch.bfloat16 and parameter.grad is None


def test_texts_too_short_to_teach_are_passed_over():
    model = make_model()
    data = collect(model, [([], [3, 4, 5]), ([3], []), ([], [*range(20)])])
    losses = train_drafter(DRAFTERS["chimera"](model), model, data, epochs=4, batch_size=1)
    assert sum(loss == 0 for loss in losses) == 8
    taught = [loss for loss in losses if loss]
    assert taught[-1] < taught[0]


def test_heads_whose_training_breaks_off_have_the_models_type_again():
    model = make_model(dtype=torch.bfloat16)
    heads = DynamicInference(model)

    def progress(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heads.fit_heads(torch.randint(40, (4, 8)), epochs=3, batch_size=2, progress=progress)
    assert all(parameter.dtype == torch.bfloat16 and parameter.grad is None for parameter in heads.heads.parameters())

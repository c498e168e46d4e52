"""TemporalFusion: every line under "What must be true", its cache, its thread, and what may go wrong."""

from __future__ import annotations

import itertools
import os
import queue
import random
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from paperworks.decoding import Sampling, Target, TreeCache, generate
from paperworks.decoding.cache import SlotCache
from paperworks.decoding.temporal_fusion import TemporalFusion, compaction_plan
from tests.decoding.conftest import FAMILIES, make_model

BAD = 13  # a token id that tests make poisonous


def make_server(model, **options):
    return TemporalFusion(model, **{"max_concurrency": 4, "max_seq_len": 48, **options})


def submit(server, prompt, new, **options):
    return server.submit(prompt, max_new_tokens=new, eos_token_id=[], **options)


def alone(model, prompt, new):
    """transformers' own greedy text."""
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


def serve(server, schedule):
    """Submit `(step, prompt, length, options)` when their step has come; return the handles."""
    handles, pending, now = [], sorted(schedule, key=lambda item: item[0]), 0
    while pending or server.busy:
        while pending and pending[0][0] <= now:
            _, prompt, new, options = pending.pop(0)
            handles.append(submit(server, prompt, new, **options))
        server.step()
        now += 1
    return handles


def random_prompts(chance, count):
    return [[chance.randrange(40) for _ in range(chance.randrange(1, 12))] for _ in range(count)]


@pytest.fixture(scope="module")
def pool():
    """A model, prompts, and what it says after each when it is alone."""
    model = make_model()
    prompts = [prompt for prompt in random_prompts(random.Random(1), 40) if BAD not in prompt][:10]
    greedy = [alone(model, prompt, 30) for prompt in prompts]
    return model, prompts, greedy


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# 1. Isolation


@pytest.mark.parametrize("seed", range(20))
def test_isolation_each_request_has_its_text_of_running_alone(pool, seed):
    model, prompts, greedy = pool
    chance = random.Random(seed)
    server = make_server(
        model, max_concurrency=chance.randint(1, 6), compaction=chance.choice(["window", "none"]),
        joins_per_step=chance.choice([1, 3]),
    )  # fmt: skip
    which = [chance.randrange(len(prompts)) for _ in range(10)]
    schedule = [(chance.randrange(30), prompts[i], chance.randint(1, 30), {}) for i in which]
    handles = serve(server, schedule)
    assert len(handles) == 10
    for handle in handles:
        assert handle.tokens == greedy[prompts.index(handle.prompt.tolist())][: handle.max_new_tokens]
        assert handle.status == "finished"


@pytest.mark.parametrize("compaction", ["window", "none"])
def test_isolation_sampled_requests_keep_their_own_generator_and_settings(pool, compaction):
    model, prompts, greedy = pool
    chance = random.Random(3)
    laws = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.5, top_p=0.8), Sampling(1.0)]
    settings = [(prompts[i], chance.randint(5, 25), laws[i % 5]) for i in range(10)]
    schedule = [
        (chance.randrange(12), prompt, new, {"sampling": law, "generator": seeded(i)})
        for i, (prompt, new, law) in enumerate(settings)
    ]
    handles = serve(make_server(model, compaction=compaction), schedule)
    by_prompt = {tuple(handle.prompt.tolist()): handle.tokens for handle in handles}
    for i, (prompt, new, law) in enumerate(settings):
        expected = generate(
            model, torch.tensor([prompt]), max_new_tokens=new, temperature=law.temperature, top_k=law.top_k,
            top_p=law.top_p, generator=seeded(i), eos_token_id=[],
        ).new_tokens[0]  # fmt: skip
        assert by_prompt[tuple(prompt)] == expected
        assert law.greedy or expected != greedy[i][:new]


@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_in_every_family_of_models(family):
    model, chance = make_model(family), random.Random(5)
    prompts = random_prompts(chance, 5)
    schedule = [(i, prompt, chance.randint(1, 20), {}) for i, prompt in enumerate(prompts)]
    for handle in serve(make_server(model, max_concurrency=3), schedule):
        assert handle.tokens == alone(model, handle.prompt.tolist(), handle.max_new_tokens)


# 2. The plan


def test_compaction_plan_is_minimal_for_all_flags():
    for n in range(12):
        for live in itertools.product([False, True], repeat=n):
            start, moves = compaction_plan(live)
            width = sum(live)
            costs = [width - sum(live[s : s + width]) for s in range(n - width + 1)]
            assert len(moves) == min(costs) and start == costs.index(min(costs))
            window = set(range(start, start + width))
            assert len({*moves.values()}) == len(moves)
            assert all(live[source] and source not in window for source in moves)
            assert all(not live[destination] and destination in window for destination in moves.values())
            after = {slot for slot in range(n) if live[slot]} - {*moves} | {*moves.values()}
            assert after == window
            assert list(moves) == sorted(moves) and list(moves.values()) == sorted(moves.values())
            if width in (0, n):
                assert not moves


# 3. The cache


@pytest.mark.parametrize("compaction", ["window", "none"])
def test_live_rows_keys_and_values_equal_a_fresh_prefill_after_every_step(pool, compaction):
    model, prompts, _ = pool
    chance = random.Random(8)
    server = make_server(model, compaction=compaction)
    target, checked, after_move = Target(model), 0, 0
    waiting = [(prompt, chance.randint(2, 24)) for prompt in prompts]
    while waiting or server.busy:
        if waiting:
            submit(server, *waiting.pop())
        moves = server.statistics.moves
        server.step()
        after_move += server.statistics.moves > moves and server.busy
        for slot, handle in enumerate(server._slots):
            if handle is None:
                continue
            # The last token has not been read yet.
            text = torch.cat([handle.prompt, torch.tensor(handle.tokens[:-1], dtype=torch.long)])
            fresh = TreeCache(target.config, 1)
            with torch.inference_mode():
                target.prefill([text], fresh)
            for ours, theirs in zip(server._cache.layers, fresh.layers, strict=True):
                for memory, states in zip(ours.memory, (theirs.keys, theirs.values), strict=True):
                    torch.testing.assert_close(
                        memory[slot, :, : len(text)], states[0, :, : len(text)], atol=1e-9, rtol=0
                    )
            checked += 1
    assert checked > 50 and (after_move > 1) == (compaction == "window")


def test_slot_cache_moves_shows_and_clears_rows_without_touching_others(pool):
    model, prompts, _ = pool
    target, cache = Target(model), SlotCache(model.config, rows=5, capacity=16)
    with torch.inference_mode():
        for slot in (1, 3, 4):
            cache.show(slot, slot + 1)
            target.prefill([torch.arange(slot + 1)], cache)
        cache.show(0, 5)
        assert cache.lengths == [0, 2, 0, 4, 5]
        before = [states.clone() for states in cache.layers[1].memory]
        cache.move({3: 0, 4: 2})
        assert cache.lengths == [4, 2, 5, 0, 0]
        for old, new in zip(before, cache.layers[1].memory, strict=True):
            assert torch.equal(new[0, :, :4], old[3, :, :4]) and torch.equal(new[2, :, :5], old[4, :, :5])
            assert torch.equal(new[1], old[1])
            assert new[0].abs().sum() > 0
        cache.clear(2, erase=True)
        assert cache.lengths == [4, 2, 0, 0, 0] and not cache.layers[0].memory[1][2].any()
        for wrong in ({0: 1}, {0: 3, 1: 3}):
            with pytest.raises(ValueError, match="different free rows"):
                cache.move(wrong)
        with pytest.raises(ValueError, match="holds 16 tokens"):
            cache.show(3, 4)
            target.prefill([torch.arange(17)], cache)
    for low, high in ((3, 3), (-1, 2), (2, 6)):
        with pytest.raises(ValueError, match="a window holds rows of 0 to 5"):
            cache.show(low, high)
    with pytest.raises(TypeError, match="keeps all its rows"):
        cache.select([0])
    with pytest.raises(ValueError, match="capacity=0"):
        SlotCache(model.config, rows=1, capacity=0)


def test_slot_cache_takes_its_memory_once(pool):
    model, prompts, _ = pool
    server = make_server(model, max_concurrency=3)
    submit(server, prompts[0], 2)
    server.step()
    places = [states.data_ptr() for layer in server._cache.layers for states in layer.memory]
    serve(server, [(i, prompt, 5 + i, {}) for i, prompt in enumerate(prompts)])
    assert places == [states.data_ptr() for layer in server._cache.layers for states in layer.memory]
    assert server.statistics.moves > 0


# 4. Work


@pytest.mark.parametrize("seed", range(4))
def test_work_is_live_rows_and_no_others(pool, seed):
    model, prompts, _ = pool
    chance = random.Random(seed)
    lengths = [chance.randint(1, 20) for _ in prompts]
    schedule = [(chance.randrange(10), prompt, new, {}) for prompt, new in zip(prompts, lengths, strict=True)]
    fused, loose = make_server(model), make_server(model, compaction="none")
    serve(fused, schedule)
    serve(loose, schedule)
    decode_steps = sum(new - 1 for new in lengths)
    assert fused.statistics.row_steps == fused.statistics.live_row_steps == decode_steps
    assert fused.statistics.occupancy == 1
    assert loose.statistics.live_row_steps == decode_steps < loose.statistics.row_steps
    assert loose.statistics.moves == 0 < fused.statistics.moves


def test_work_of_a_hole_is_done_until_the_ends_pass_it_without_reordering(pool):
    model, prompts, _ = pool
    rows = []
    for compaction in ("none", "window"):
        server = make_server(model, joins_per_step=3, compaction=compaction)
        for prompt, new in zip(prompts[:3], (8, 4, 6), strict=True):
            submit(server, prompt, new)
        rows.append([])
        while server.busy:
            done = server.statistics.row_steps
            server.step()
            rows[-1].append(server.statistics.row_steps - done)
    # Passes 1 to 3 give the middle one its last token; 5 the third; 7 the first.
    assert rows == [[3, 3, 3, 3, 3, 1, 1], [3, 3, 3, 2, 2, 1, 1]]


# 5. Joining


def test_a_request_joins_while_others_run_and_waits_for_nobody(pool):
    model, prompts, _ = pool
    server = make_server(model)
    running = submit(server, prompts[0], 30)
    for _ in range(5):
        server.step()
    late = submit(server, prompts[1], 10)
    server.step()
    # The first by its prefill, the second by the pass of the same step.
    assert len(late.tokens) == 2 and len(running.tokens) == 7 and not running.done
    while server.step():
        pass
    assert running.started < late.started < late.ended < running.ended


@pytest.mark.parametrize("concurrency, joins, steps", [(4, 4, 11), (4, 1, 14), (1, 1, 44)])
def test_requests_at_once_and_of_equal_length_are_a_static_batch(pool, concurrency, joins, steps):
    """Fused passes: length - 1 as in a static batch, one more for each that joins a step later, or all in a row."""
    model, prompts, _ = pool
    server = make_server(model, max_concurrency=concurrency, joins_per_step=joins)
    serve(server, [(0, prompt, 12, {}) for prompt in prompts[:4]])
    assert server.statistics.steps == steps
    assert server.statistics.row_steps == 44 and server.statistics.prefills == 4


# 6. Time


def makespan_by_events(requests, slots, fixed, each):
    """When the last of (arrival, length) has ended, by its own book-keeping: no scheduler, no slots."""
    now, live, pending = 0.0, [], sorted(requests)
    while live or pending:
        if not live and pending[0][0] > now:
            now = pending[0][0]
        while pending and pending[0][0] <= now and len(live) < slots:
            left = pending.pop(0)[1] - 1
            live += [left] if left else []
        if live:
            now += fixed + each * len(live)
            live = [left - 1 for left in live if left > 1]
    return now


@pytest.mark.parametrize("fixed, each", [(1.0, 0.0), (1.0, 0.25), (0.0, 1.0)])
def test_simulated_makespan_equals_the_event_driven_formula(pool, fixed, each):
    model, prompts, _ = pool
    chance = random.Random(2)
    requests = [(8 * chance.random(), chance.randint(1, 15)) for _ in prompts]
    server, now, pending = make_server(model, joins_per_step=10), 0.0, sorted(requests)
    while pending or server.busy:
        if not server.busy and pending[0][0] > now:
            now = pending[0][0]
        while pending and pending[0][0] <= now:
            submit(server, prompts[len(pending) - 1], pending.pop(0)[1])
        steps, rows = server.statistics.steps, server.statistics.row_steps
        server.step()
        now += fixed * (server.statistics.steps - steps) + each * (server.statistics.row_steps - rows)
    assert now == pytest.approx(makespan_by_events(requests, 4, fixed, each), rel=1e-12)


def test_speed_up_is_the_number_of_requests_where_a_step_costs_the_same_for_any_batch(pool):
    model, prompts, _ = pool
    together, sequential = make_server(model, joins_per_step=4), make_server(model, max_concurrency=1)
    for server in (together, sequential):
        serve(server, [(0, prompt, 20, {}) for prompt in prompts[:4]])
    assert sequential.statistics.steps == 4 * together.statistics.steps


# 7. Capacity


def test_more_requests_than_slots_queue_first_in_first_out_and_none_is_lost(pool):
    model, prompts, greedy = pool
    chance = random.Random(4)
    server = make_server(model, max_concurrency=2)
    handles = [submit(server, prompt, chance.randint(1, 9)) for prompt in prompts]
    while server.step():
        assert sum(slot is not None for slot in server._slots) <= 2
    starts = [handle.started for handle in handles]
    assert starts == sorted(starts)
    assert [handle.tokens for handle in handles] == [
        text[: handle.max_new_tokens] for text, handle in zip(greedy, handles, strict=True)
    ]
    for handle in handles:
        assert 0 < handle.time_to_first_token <= handle.latency


def test_a_request_too_long_for_a_slot_is_refused_at_submit_and_the_longest_that_fits_is_served(pool):
    model, _, _ = pool
    server = make_server(model, max_seq_len=16)
    with pytest.raises(ValueError, match="10 tokens and 7 more are asked for, but a slot holds 16"):
        submit(server, list(range(10)), 7)
    assert not server.busy
    assert submit(server, list(range(10)), 6).result() == alone(model, list(range(10)), 6)


def test_a_full_queue_refuses_and_takes_again_when_one_has_ended(pool):
    model, prompts, _ = pool
    server = make_server(model, max_concurrency=1, max_waiting=2)
    handles = [submit(server, prompt, 3) for prompt in prompts[:3]]
    with pytest.raises(queue.Full, match="3 requests run or wait, as many as the server takes"):
        submit(server, prompts[3], 3)
    handles[0].result()
    handles += [submit(server, prompts[3], 3)]
    with pytest.raises(queue.Full):
        submit(server, prompts[4], 3)
    assert all(len(handle.result()) == 3 for handle in handles)


# 8. Tensor parallelism

RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from paperworks.decoding.temporal_fusion import TemporalFusion

rank, folder, requests = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(
    folder, tp_plan="auto", device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), dtype=torch.float64
).eval()
server = TemporalFusion(model, max_concurrency=3, max_seq_len=48)
handles = [server.submit(prompt, max_new_tokens=new, eos_token_id=[]) for prompt, new in requests]
while server.step():
    pass
heads = server._cache.layers[0].memory[0].shape[1]
scores = server.target.model(torch.tensor([requests[0][0]])).logits[0, -1]
print(repr((heads, server.statistics.moves, [handle.tokens for handle in handles], scores.tolist())))
"""


def test_two_ranks_of_tensor_parallelism_equal_one(pool, tmp_path):
    model, prompts, greedy = pool
    model.save_pretrained(tmp_path)
    requests = [(prompt, 4 + 3 * i % 10) for i, prompt in enumerate(prompts[:6])]
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path), repr(requests)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    for out, _ in outputs:
        heads, moves, texts, scores = eval(out)
        assert heads == 1 and moves > 0  # half of the two key-value heads
        assert texts == [text[:new] for text, (_, new) in zip(greedy, requests, strict=False)]
        with torch.no_grad():
            expected = model(torch.tensor([prompts[0]])).logits[0, -1]
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected, atol=1e-4, rtol=0)


# Failures stay with their owner


class Broken(RuntimeError):
    pass


def poison(model, how):
    """Make the token BAD unreadable: its embedding is NaN, or reading it raises."""
    if how == "nan":
        model.get_input_embeddings().weight.data[BAD] = torch.nan
    else:

        def refuse(module, args):
            if bool((args[0] == BAD).any()):
                raise Broken("this token breaks the model")

        model.get_input_embeddings().register_forward_pre_hook(refuse)


ERRORS = {"nan": (ValueError, "NaN logits"), "raise": (Broken, "this token breaks")}


@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("compaction", ["window", "none"])
def test_a_failing_prompt_is_reported_to_its_owner_and_harms_nobody_in_or_after_its_slot(pool, how, compaction):
    _, prompts, greedy = pool
    model = make_model()
    poison(model, how)
    server = make_server(model, max_concurrency=2, compaction=compaction)
    companion = max(range(10), key=lambda i: -greedy[i].index(BAD) if BAD in greedy[i] else 0)
    first = submit(server, prompts[companion], 25)
    bad = submit(server, [1, 2, BAD, *range(12)], 5)
    following = [submit(server, [7, 7], 4), submit(server, [8], 6)]
    kind, words = ERRORS[how]
    with pytest.raises(kind, match=words):
        bad.result()
    with pytest.raises(kind, match=words):
        list(bad)
    assert bad.status == "failed" and bad.tokens == []
    healthy = make_model()
    assert first.result() == greedy[companion][:25]
    assert [handle.result() for handle in following] == [alone(healthy, [7, 7], 4), alone(healthy, [8], 6)]
    # No pass had to be repeated row by row, as it would be if NaN states were left in the slot.
    assert compaction == "none" or server.statistics.row_steps == 24 + 3 + 5


@pytest.mark.parametrize("how", ERRORS)
def test_a_request_that_fails_on_its_way_leaves_its_companions_and_their_draws_alone(pool, how):
    healthy, _, _ = pool
    model = make_model()
    poison(model, how)
    # Sampled texts: those that come to read the token BAD fail there, the others must be as ever.
    chance = random.Random(6)
    settings = [([chance.choice([1, 2, 3, 5, 8])], 30, Sampling(1.6), seed) for seed in range(16)]
    expected = [
        generate(
            healthy, torch.tensor([prompt]), max_new_tokens=new, temperature=1.6, generator=seeded(seed), eos_token_id=[]
        ).new_tokens[0]
        for prompt, new, _, seed in settings
    ]  # fmt: skip
    server = make_server(model, max_concurrency=5)
    handles = [submit(server, prompt, new, sampling=law, generator=seeded(seed)) for prompt, new, law, seed in settings]
    while server.step():
        pass
    failing = [BAD in text[:-1] for text in expected]
    assert 2 < sum(failing) < 14
    for handle, text, fails in zip(handles, expected, failing, strict=True):
        assert handle.tokens == (text[: text.index(BAD) + 1] if fails else text)
        assert handle.status == ("failed" if fails else "finished")
        assert isinstance(handle.error, ERRORS[how][0]) == fails


@pytest.mark.parametrize(
    "prompt, options, kind, words",
    [
        ([], {}, ValueError, "is empty"),
        (torch.zeros(0), {}, ValueError, "is empty"),
        ([1, 40], {}, ValueError, "outside 0..39"),
        ([0.5], {}, ValueError, "must be integers"),
        ([[1, 2], [3, 4]], {}, ValueError, "a request is one prompt, got 2"),
        ("a text", {}, TypeError, "token ids, got text"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ([1], {"max_new_tokens": 2.5}, TypeError, "must be a whole number, got 2.5"),
        ([1], {"max_new_tokens": 64}, ValueError, "context holds 64"),
    ],
)
def test_bad_requests_are_refused_in_one_clear_sentence(pool, prompt, options, kind, words):
    server = make_server(pool[0])
    with pytest.raises(kind, match=words):
        server.submit(prompt, **{"max_new_tokens": 4, **options})
    assert not server.busy


def test_bad_settings_are_refused_in_one_clear_sentence(pool):
    for name in ("max_concurrency", "max_seq_len", "joins_per_step"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_server(pool[0], **{name: 0})
    with pytest.raises(ValueError, match="max_waiting must be at least 0, got -1"):
        make_server(pool[0], max_waiting=-1)
    with pytest.raises(ValueError, match="compaction must be 'window' or 'none', got 'swap'"):
        make_server(pool[0], compaction="swap")


def test_a_generator_shared_with_a_request_under_way_is_refused(pool):
    model, prompts, _ = pool
    server, generator = make_server(model), seeded(0)
    first = submit(server, prompts[0], 3, sampling=Sampling(1.0), generator=generator)
    with pytest.raises(ValueError, match="another request draws from this generator"):
        submit(server, prompts[1], 3, sampling=Sampling(1.0), generator=generator)
    first.result()
    assert len(submit(server, prompts[1], 3, sampling=Sampling(1.0), generator=generator).result()) == 3


def test_requests_without_a_generator_differ(pool):
    server = make_server(pool[0])
    texts = [submit(server, [3, 1], 20, sampling=Sampling(3.0)) for _ in range(2)]
    assert texts[0].result() != texts[1].result()


# Ends and cancelling


def test_a_request_ends_at_its_own_end_token(pool):
    model, prompts, greedy = pool
    end = greedy[0][6]
    server = make_server(model)
    one = server.submit(prompts[0], max_new_tokens=30, eos_token_id=end)
    other = submit(server, prompts[0], 30)
    assert one.result() == greedy[0][: greedy[0].index(end) + 1] and other.result() == greedy[0]
    model = make_model()
    model.generation_config.eos_token_id = [end]
    assert make_server(model).submit(prompts[0], max_new_tokens=30).result() == one.tokens


def test_cancelling_frees_the_slot_and_loses_no_other(pool):
    model, prompts, greedy = pool
    server = make_server(model, max_concurrency=3, joins_per_step=3)
    handles = [submit(server, prompt, 20) for prompt in prompts[:5]]
    for _ in range(4):
        server.step()
    assert handles[1].cancel() and handles[3].cancel() and not handles[1].cancel()
    assert handles[1].status == handles[3].status == "cancelled"
    rows = server.statistics.row_steps
    server.step()
    # The one running is out before the pass, the one waiting never came in, the next has joined.
    assert server.statistics.row_steps - rows == 3 and len(handles[4].tokens) == 2
    assert [handles[i].result() for i in (0, 2, 4)] == [greedy[i][:20] for i in (0, 2, 4)]
    assert handles[1].tokens == list(handles[1]) == greedy[1][:5]
    for handle in (handles[1], handles[3]):
        with pytest.raises(CancelledError, match="was cancelled after"):
            handle.result()
    assert not handles[0].cancel() and "20 of 20 new" in repr(handles[0])


# The thread


def test_many_threads_submit_stream_and_cancel_at_once(pool):
    model, prompts, greedy = pool

    def client(index):
        handle = submit(server, prompts[index % 10], 4 + index)
        streamed = []
        for token in handle:
            streamed.append(token)
            if index % 4 == 3 and len(streamed) == 3:
                handle.cancel()
        return handle, streamed

    with make_server(model, max_concurrency=3) as server, ThreadPoolExecutor(24) as clients:
        results = list(clients.map(client, range(24)))
    for index, (handle, streamed) in enumerate(results):
        assert streamed == handle.tokens == greedy[index % 10][: len(streamed)]
        if index % 4 == 3:
            assert handle.status == "cancelled" and len(streamed) >= 3
        else:
            assert len(streamed) == 4 + index
    assert not server.busy


def test_tokens_stream_while_the_request_runs(pool):
    model, prompts, _ = pool
    gate = threading.Semaphore(1)
    hook = model.register_forward_pre_hook(lambda *args: gate.acquire() and None)
    try:
        with make_server(model) as server:
            handle = submit(server, prompts[0], 6)
            tokens = iter(handle)
            for count in range(1, 6):
                next(tokens)
                # The next pass waits for the gate: no token can be ahead.
                assert len(handle.tokens) == count and not handle.done
                with pytest.raises(TimeoutError, match="no end within the timeout"):
                    handle.result(timeout=0.01)
                gate.release()
            assert len(list(tokens)) == 1
    finally:
        hook.remove()


def test_leaving_the_context_serves_what_was_handed_over_and_closes(pool):
    model, prompts, greedy = pool
    with make_server(model) as server:
        handles = [submit(server, prompt, 5) for prompt in prompts]
    assert [handle.tokens for handle in handles] == [text[:5] for text in greedy]
    with pytest.raises(RuntimeError, match="the server is closed"):
        submit(server, prompts[0], 5)
    with pytest.raises(RuntimeError, match="serves once"), server:
        pass


def test_leaving_the_context_by_an_error_cancels_what_is_left(pool):
    model, prompts, _ = pool
    with pytest.raises(KeyError), make_server(model, max_concurrency=1) as server:
        handles = [submit(server, prompt, 30) for prompt in prompts]
        raise KeyError
    assert handles[-1].status == "cancelled" and all(handle.done for handle in handles)
    assert not server._thread.is_alive()


def test_closing_without_a_thread_serves_too(pool):
    model, prompts, greedy = pool
    server = make_server(model)
    handle = submit(server, prompts[0], 5)
    server.close()
    assert handle.tokens == greedy[0][:5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_server_that_broke(pool, monkeypatch):
    model, prompts, _ = pool

    def burst(*args):
        raise Broken("memory is gone")

    monkeypatch.setattr("paperworks.decoding.cache.SlotCache.move", burst)
    with make_server(model) as server:
        handle = submit(server, prompts[0], 5)
        with pytest.raises(Broken, match="memory is gone"):
            handle.result(timeout=60)
        server._thread.join()
        with pytest.raises(RuntimeError, match="the server is closed"):
            submit(server, prompts[0], 5)


@pytest.mark.parametrize("passes", [0, 1, 2, 4])
def test_a_pass_that_is_interrupted_may_be_gone_on_with(pool, passes):
    """Ctrl-C in a prompt's pass or in a common one: no request is lost, and none has another text."""
    model, prompts, greedy = pool
    server = make_server(model)
    handles = [submit(server, prompt, 6) for prompt in prompts[:3]]
    left = [passes]

    def interrupt(*args):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    with model.model.layers[1].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        handles[0].result()
    assert not any(handle.done for handle in handles)
    assert [handle.result() for handle in handles] == [text[:6] for text in greedy[:3]] and not server.busy


def test_a_step_may_be_interrupted_at_any_line_of_it(pool):
    """Ctrl-C behind every seventh line that server and cache execute, one after the other."""
    model, prompts, greedy = pool
    code = {module.__file__ for module in (sys.modules[TemporalFusion.__module__], sys.modules[SlotCache.__module__])}
    lengths = [1, 5, 3]  # One ends while the others run, which moves rows.
    interrupted = 0
    for after in itertools.count(0, 7):
        server = make_server(model, max_concurrency=2)
        handles = [submit(server, prompt, new) for prompt, new in zip(prompts, lengths, strict=False)]
        left = [after]

        def trace(frame, event, arg, left=left):
            if frame.f_code.co_filename not in code:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == -1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            while server.step():
                pass
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        if left[0] >= 0:
            break
        texts = [handle.result(timeout=60) for handle in handles]
        assert texts == [text[:new] for text, new in zip(greedy, lengths, strict=False)], after
        assert not server.busy and not any(server._slots) and not any(server._cache._all)
    assert interrupted > 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_server_whose_thread_was_stopped(pool):
    model, prompts, _ = pool

    def stop(*args):
        raise SystemExit(3)

    with make_server(model) as server, model.model.layers[1].register_forward_hook(stop):
        handle = submit(server, prompts[0], 5)
        with pytest.raises(RuntimeError, match="the server was stopped by SystemExit"):
            handle.result(timeout=60)

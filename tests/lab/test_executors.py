import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from enum import Enum
from pathlib import Path

import pytest

from paperworks.errors import UsageError
from paperworks.lab import Run, Store, execute, recipe
from paperworks.lab import executors as module
from paperworks.lab.executors import executor


@pytest.fixture
def store(store_url, tmp_path):
    with Store(store_url, artefacts=tmp_path / "artefacts") as opened:
        yield opened


@pytest.fixture
def coin(registry):
    class Side(Enum):
        HEADS = "heads"
        TAILS = "tails"

    @recipe(paper="coin", tiny={"flips": 2}, large={"flips": 1000})
    def coin(run: Run, flips: int = 10, side: Side = Side.HEADS, seed: int = 0) -> None:
        """Flip a coin."""
        import random

        from matplotlib.figure import Figure

        assert isinstance(side, Side)
        rng = random.Random(seed)
        run.log("flipping")
        outcomes = run.map(lambda _: rng.random(), run.progress(flips, "flipping"), "looking")
        run.record("flips", len(outcomes), better="higher", series=side.value)
        run.compare(baseline=lambda: sorted(range(999)), method=lambda: sorted(range(9)), repeats=2)
        run.figure(Figure())
        (run.artefact_folder / "outcomes.txt").write_text(str(outcomes))

    return coin


def check(run: Run, store: Store, flips: int) -> None:
    back = store.run(run.id)
    assert (run.status, run.error) == ("finished", None), run.traceback
    assert back.status == "finished" and back.parameters == {"flips": flips, "side": "tails"}
    assert back.measurements == run.measurements
    assert [m.name for m in back.measurements] == ["flips", "time", "time", "speed-up"]
    assert (back.measurements[0].value, back.measurements[0].series) == (flips, "tails")
    assert [log.message for log in back.logs] == ["flipping"]
    assert set(back.artefacts) == {"figure", "outcomes.txt"}
    assert back.artefacts["figure"].read_bytes().startswith(b"\x89PNG")
    assert len(back.artefacts["outcomes.txt"].read_text().split(",")) == flips
    assert back.environment["cores"] >= 1 and back.environment == run.environment
    assert back.finished is not None and back.bars == ()


@pytest.mark.parametrize(("scale", "flips"), [("tiny", 2), ("default", 10), ("paper", 1000)])
def test_a_recipe_runs_at_every_scale(coin, store, scale, flips):
    check(execute(coin, scale=scale, parameters={"side": "tails"}, store=store), store, flips)


def test_options_may_be_text_and_a_recipe_a_slug(coin, store):
    run = execute("coin", parameters={"flips": "3", "side": "tails"}, store=store, scale="paper", seed=9)
    check(run, store, 3)
    back = store.run(run.id)
    assert (back.scale, back.seed) == ("paper", 9)


def test_the_same_seed_gives_the_same_outcomes(coin, tmp_path):
    texts = [
        execute(coin, seed=seed, store=tmp_path / "runs.db").artefacts["outcomes.txt"].read_text() for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parameters": {"flip": 3}}, "coin has no option flip; did you mean flips"),
        ({"parameters": {"flips": "x"}}, "coin: flips takes a whole number, not 'x'"),
        ({"scale": "huge"}, "coin has no scale 'huge'"),
        ({"seed": -1}, "seed is a whole number of at least 0, not -1"),
        ({"seed": "x"}, "seed is a whole number of at least 0, not 'x'"),
        ({"on": "moon"}, "on 'moon' is no place to run; choose here, ray, auto or ray://host:port"),
    ],
)
def test_bad_use_is_refused_and_nothing_is_stored(coin, tmp_path, wrong, message):
    with Store(tmp_path / "runs.db") as store:
        with pytest.raises(UsageError, match=message):
            execute(coin, store=store, **wrong)
        assert store.runs() == []


def test_a_run_that_fails_keeps_what_it_had_and_why(registry, store):
    @recipe(paper="cliff")
    def cliff(run: Run) -> None:
        run.record("steps", 3, better="higher")
        (run.artefact_folder / "diary.txt").write_text("going well")
        raise ValueError("stepped over the edge\nand fell")

    run = execute(cliff, store=store)
    back = store.run(run.id)
    assert back.status == run.status == "failed"
    assert back.error == "ValueError: stepped over the edge"
    assert "in cliff" in back.traceback and "and fell" in back.traceback
    assert [m.value for m in back.measurements] == [3]
    assert back.artefacts["diary.txt"].read_text() == "going well"
    assert isinstance(run.exception, ValueError)


def test_a_usage_error_in_a_recipe_keeps_its_sentence_and_exit_status(registry, store):
    @recipe(paper="cliff")
    def cliff(run: Run) -> None:
        raise UsageError("there is no model 'gpt-9'; choose smollm2-135m")

    run = execute(cliff, store=store)
    assert run.status == "failed" and run.error == "there is no model 'gpt-9'; choose smollm2-135m"
    assert run.exception.exit_status == 2


def test_a_run_that_the_user_stops_is_interrupted_and_keeps_what_it_had(registry, store):
    @recipe(paper="long")
    def long(run: Run) -> None:
        with run.progress(10, "waiting"):
            run.record("steps", 3, better="higher")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(long, store=store)
    [back] = store.runs()
    assert (back.status, back.error) == ("interrupted", "stopped by the user")
    assert [m.value for m in back.measurements] == [3] and back.bars == ()


@pytest.mark.parametrize(
    ("code", "told"), [((), ""), ((0,), "0"), ((3,), "3"), (("the data are gone",), "'the data are gone'")]
)
def test_a_recipe_that_leaves_by_sys_exit_has_failed_and_its_code_is_told(registry, store, code, told):
    @recipe(paper="door")
    def door(run: Run) -> None:
        run.record("steps", 3, better="higher")
        sys.exit(*code)

    run = execute(door, store=store)
    back = store.run(run.id)
    assert run.status == back.status == "failed"
    assert run.error == back.error == f"the recipe left by sys.exit({told}) before its end"
    assert "in door" in back.traceback and [m.value for m in back.measurements] == [3]


def test_what_no_handler_of_errors_catches_fails_the_run_and_goes_on(registry, store):
    @recipe(paper="task")
    def task(run: Run) -> None:
        raise asyncio.CancelledError("no time")

    with pytest.raises(asyncio.CancelledError):
        execute(task, store=store)
    [back] = store.runs()
    assert (back.status, back.error) == ("failed", "CancelledError: no time")


def test_a_run_takes_place_once(coin, store):
    run = execute(coin, store=store, run_id="20261127-000000-abcd", show_progress=False)
    kept = store.run(run.id)
    with pytest.raises(UsageError, match="run 20261127-000000-abcd is finished already"):
        execute(coin, store=store, run_id=run.id, parameters={"flips": 2})
    back = store.run(run.id)
    assert (back.status, back.parameters) == ("finished", kept.parameters)
    assert back.measurements == kept.measurements and back.logs == kept.logs


def test_a_run_that_is_under_way_is_not_begun_again(registry, store):
    @recipe(paper="twins")
    def twins(run: Run, first: bool = True) -> None:
        run.record("steps", 1, better="higher")
        if first:
            execute("twins", store=store, run_id=run.id, parameters={"first": False})

    run = execute(twins, store=store)
    assert run.status == "failed" and "is under way already" in run.error
    assert [m.value for m in store.run(run.id).measurements] == [1]


def test_a_run_begins_with_its_environment_so_that_no_other_begins_it_meanwhile(coin, store, monkeypatch):
    begun, begin = [], Store.begin
    monkeypatch.setattr(
        Store, "begin", lambda self, run: (begin(self, run), begun.append(self.run(run.id).environment))
    )
    execute(coin, store=store, scale="tiny")
    assert begun[0]["cores"] >= 1


def test_an_announced_run_is_taken_over(coin, store):
    store.begin(Run("coin", id="announced"))
    run = execute(coin, store=store, run_id="announced", scale="tiny", parameters={"side": "tails"})
    check(run, store, 2)


def test_a_run_outside_the_main_thread_finishes(coin, tmp_path):
    ran = []
    thread = threading.Thread(target=lambda: ran.append(execute(coin, scale="tiny", store=tmp_path / "runs.db")))
    thread.start()
    thread.join()
    assert ran[0].status == "finished", ran[0].traceback


def signalled(number: int) -> None:
    """Send this process a signal, and wait until its handler has run."""
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "stopped by the user"),
        (signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGHUP, "stopped by SIGHUP"),
    ],
)
@pytest.mark.parametrize("sour", [False, True])
def test_a_signal_interrupts_the_run(registry, store, number, told, sour):
    @recipe(paper="long")
    def long(run: Run) -> None:
        run.record("steps", 3, better="higher")
        try:
            signalled(number)
        except KeyboardInterrupt:
            if sour:
                # As libraries do that are stopped while they load.
                raise ImportError("could not import the rest") from None
            raise

    # Ray, where another test joined one, leaves a handler of its own.
    kept = signal.getsignal(number) or signal.SIG_DFL
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    before = signal.getsignal(number)
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(long, store=store)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, kept)
    [back] = store.runs()
    assert (back.status, back.error) == ("interrupted", told)
    assert [m.value for m in back.measurements] == [3]


def test_a_handler_of_the_users_own_keeps_its_say(registry, store, monkeypatch):
    @recipe(paper="long")
    def long(run: Run) -> None:
        signalled(signal.SIGTERM)

    def leave(number: int, frame: object) -> None:
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit, match="143"):
            execute(long, store=store)
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
    [back] = store.runs()
    assert (back.status, back.error) == ("interrupted", "stopped by SIGTERM")


def test_a_signal_that_is_ignored_stays_ignored(registry, store):
    @recipe(paper="deaf")
    def deaf(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert execute(deaf, store=store).status == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_a_run_that_does_not_hear(store_url, tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER.replace(ASLEEP, DEAF))
    with subprocess.Popen([sys.executable, str(script), store_url], stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout.readline() == "recorded\n"
        sleeper.send_signal(signal.SIGTERM)
        assert sleeper.stdout.readline() == "not now\n"
        sleeper.send_signal(signal.SIGTERM)
        assert sleeper.wait(60) == -signal.SIGTERM
    with Store(store_url) as store:
        assert store.runs()[0].status == "interrupted"


SLEEPER = """
import sys, time
from paperworks.lab import Run, execute, recipe

@recipe(paper="sleeper")
def sleeper(run: Run) -> None:
    run.record("tokens", 42, better="higher", series="Hydra")
    print("recorded", flush=True)
    time.sleep(600)

execute(sleeper, store=sys.argv[1])
"""
ASLEEP = """    print("recorded", flush=True)
    time.sleep(600)
"""
DEAF = """    try:
        print("recorded", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print("not now", flush=True)
        time.sleep(600)
"""


def test_a_killed_run_is_interrupted_and_what_it_had_recorded_is_there(store_url, tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    with subprocess.Popen([sys.executable, str(script), store_url], stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout.readline() == "recorded\n"
        with Store(store_url) as store:
            assert store.runs()[0].status == "running"
        sleeper.send_signal(signal.SIGKILL)
    with Store(store_url) as store:
        [run] = store.runs()
        assert run.status == "interrupted"
        assert [(m.name, m.value, m.series) for m in run.measurements] == [("tokens", 42, "Hydra")]


def test_a_heart_beats_while_a_run_lasts_and_rests_afterwards(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HEARTBEAT", 0.01)
    beats = []
    monkeypatch.setattr(Store, "beat", lambda self, run_id: beats.append(run_id))

    @recipe(paper="long")
    def long(run: Run) -> None:
        deadline = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)

    run = execute(long, store=tmp_path / "runs.db")
    assert len(beats) >= 3 and set(beats) == {run.id}
    after = len(beats)
    time.sleep(0.1)
    assert len(beats) == after


def test_a_heartbeat_that_fails_does_not_stop_the_run(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HEARTBEAT", 0.01)
    failed = []

    def beat(self: Store, run_id: str) -> None:
        failed.append(run_id)
        raise UsageError("the store does not answer")

    monkeypatch.setattr(Store, "beat", beat)

    @recipe(paper="long")
    def long(run: Run) -> None:
        deadline = time.monotonic() + 30
        while len(failed) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    assert execute(long, store=tmp_path / "runs.db").status == "finished"
    assert len(failed) >= 2


def test_without_ray_the_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'running on ray needs Ray: pip install "paperworks\[ray\]"'):
        executor("ray")


def test_a_ray_cluster_that_does_not_answer_is_refused(monkeypatch):
    ray = pytest.importorskip("ray")
    # Other tests may have joined one, which would be used.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UsageError, match=f"no Ray cluster answers at ray://127.0.0.1:{port}"):
        executor(f"ray://127.0.0.1:{port}")


@pytest.fixture(scope="session")
def one_ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    # A token of our own keeps Ray from leaving one in the user's home.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="tests")
    yield ray
    ray.shutdown()


@pytest.mark.ray
def test_a_recipe_runs_on_ray_as_it_does_here(one_ray, coin, store):
    check(execute(coin, parameters={"flips": 3, "side": "tails"}, store=store, on="ray"), store, 3)


@pytest.mark.ray
def test_a_run_on_ray_takes_place_in_another_process_and_is_kept_while_it_lasts(one_ray, registry, tmp_path):
    @recipe(paper="postman")
    def postman(run: Run, box: str = "") -> None:
        import os
        import time
        from pathlib import Path

        run.record("process", os.getpid(), better="higher")
        deadline = time.monotonic() + 60
        while not Path(box).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        run.record("answered", Path(box).exists(), better="higher")

    box, seen = tmp_path / "answer", []
    with Store(tmp_path / "runs.db") as store:

        class Reader:
            def add(self, run_id, entry):
                store.add(run_id, entry)
                if store.run(run_id).measurements:
                    seen.append(store.run(run_id).status)
                    box.write_text("here")

            def __getattr__(self, name):
                return getattr(store, name)

        options = postman.plain({"box": str(box)})
        run = module._execute(postman, options, "default", 0, Reader(), executor("ray"), False)
        process, answered = store.run(run.id).measurements
    assert process.value != os.getpid() and answered.value == 1 and seen[0] == "running"


@pytest.mark.ray
def test_a_run_that_fails_on_ray_keeps_what_it_had_and_why(one_ray, registry, tmp_path):
    @recipe(paper="cliff")
    def cliff(run: Run) -> None:
        run.record("steps", 3, better="higher")
        raise ValueError("stepped over the edge")

    run = execute(cliff, store=tmp_path / "runs.db", on="ray")
    assert (run.status, run.error) == ("failed", "ValueError: stepped over the edge")
    assert "in cliff" in run.traceback and isinstance(run.exception, ValueError)
    assert [m.value for m in run.measurements] == [3]


@pytest.mark.ray
def test_a_recipe_that_leaves_by_sys_exit_on_ray_has_failed_and_its_code_is_told(one_ray, registry, tmp_path):
    @recipe(paper="door")
    def door(run: Run) -> None:
        import sys

        run.record("steps", 3, better="higher")
        sys.exit(3)

    run = execute(door, store=tmp_path / "runs.db", on="ray")
    assert (run.status, run.error) == ("failed", "the recipe left by sys.exit(3) before its end")
    assert [m.value for m in run.measurements] == [3]


@pytest.mark.ray
def test_a_worker_that_dies_fails_the_run_once_and_keeps_what_it_had(one_ray, registry, tmp_path):
    @recipe(paper="cliff")
    def cliff(run: Run) -> None:
        import os
        import signal

        run.record("steps", 3, better="higher")
        os.kill(os.getpid(), signal.SIGKILL)

    run = execute(cliff, store=tmp_path / "runs.db", on="ray")
    assert run.status == "failed" and "WorkerCrashed" in run.error
    assert [m.value for m in run.measurements] == [3]


@pytest.mark.ray
def test_map_on_ray_keeps_the_order_and_raises_what_the_function_raises(one_ray):
    advanced = []
    place = executor("ray")
    assert place.map(lambda x: x * x, range(5), lambda: advanced.append(1)) == [0, 1, 4, 9, 16]
    assert len(advanced) == 5
    with pytest.raises(ZeroDivisionError):
        place.map(lambda x: 1 / x, [1, 0])
    assert os.getpid() not in place.map(lambda _: os.getpid(), [1])


EXAMPLE = Path(__file__).parents[2] / "examples" / "coin_flip" / "src" / "fair_bits"
INCLUDED = """
import os, sys
from paperworks.errors import UsageError
from paperworks.lab import Store, execute
from paperworks.lab.executors import executor

folder, late, url = sys.argv[1:]
if late:
    executor("ray")
os.environ["PAPERWORKS_INCLUDE"] = folder
with Store(url) as store:
    for on in ("here", "ray"):
        try:
            run = execute("coin-flip", scale="tiny", on=on, store=store, show_progress=False)
        except UsageError as error:
            print(on, f"refused: {error}", len(store.runs()))
        else:
            told = [(m.name, m.series, m.value) for m in run.measurements]
            print(on, run.status, run.error, told, [log.message != str(os.getpid()) for log in run.logs])
"""


def included(folder: Path, tmp_path: Path, late: str = "") -> dict[str, str]:
    """What a process told that ran the folder's recipe here and on a Ray of its own, which it joined before if late."""
    # A token of its own keeps Ray from leaving one in the user's home.
    environment = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-c", INCLUDED, str(folder), late, f"sqlite:///{tmp_path}/runs.db"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.ray
def test_a_package_that_is_included_runs_on_ray_as_it_does_here(tmp_path):
    pytest.importorskip("ray")
    told = included(EXAMPLE, tmp_path)
    assert told["here"] == told["ray"] and told["ray"].startswith("finished None [('bits a flip', ")


@pytest.mark.ray
def test_a_folder_that_is_included_runs_on_ray_with_what_lies_beside_and_in_tasks_of_its_own(tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "plain"
    folder.mkdir()
    shutil.copy(EXAMPLE / "coin-flip.toml", folder)
    (folder / "coin_flip.py").write_text(
        """
from paperworks.lab import Run, recipe

def share(flips: int) -> float:
    import random
    from beside import HEADS

    return sum(random.Random(flips).random() < HEADS for _ in range(flips)) / flips

@recipe("coin-flip", tiny={"flips": 9})
def coin_flip(run: Run, flips: int = 99) -> None:
    import os

    run.log(str(os.getpid()))
    for flips, value in enumerate(run.map(share, range(1, flips)), 1):
        run.record("heads", value, better="higher", series=str(flips))
"""
    )
    (folder / "beside.py").write_text("HEADS = 0.7\n")
    # A name of Python's own stays Python's, there as here.
    (folder / "random.py").write_text("raise ImportError('the wrong one')\n")
    told = included(folder, tmp_path)
    here, there = (told[on].removesuffix("]").rpartition(" [") for on in ("here", "ray"))
    assert here[0] == there[0] and here[0].startswith("finished None [('heads', '1', ")
    assert (here[2], there[2]) == ("False", "True")


@pytest.mark.ray
def test_a_folder_included_after_ray_was_joined_is_refused_before_a_run_begins(tmp_path):
    pytest.importorskip("ray")
    told = included(EXAMPLE, tmp_path, late="late")
    assert told["here"].startswith("finished")
    assert told["ray"] == (
        f"refused: workers of this Ray lack fair_bits, where coin-flip comes from (the folder {EXAMPLE}): install it there, or "
        "include its folder before Ray is joined 1"
    )

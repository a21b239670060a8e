"""The real start script: starting, stopping, and what dies; what it makes before that is in test_start_all_setup."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from launched import PROJECT, Demo, connects, demo, free_ports, get, mode, tree
from support import running, wait_until

from balancer.state.store import Store
from demo import files, services
from demo.console import Failure, say

__all__ = ["demo", "tree"]  # fixtures


# -- Starting and stopping


def test_ready_means_that_requests_are_answered_and_the_page_is_let_in(demo: Demo) -> None:
    for folder, file in (("logs", f"balancer-{demo.port}.log"), ("run", f"balancer-{demo.port}.pid")):
        (demo.tree / folder).mkdir(exist_ok=True)
        (demo.tree / folder).chmod(0o755)
        (demo.tree / folder / file).write_text("of an earlier version")
        (demo.tree / folder / file).chmod(0o644)
    run = demo.ready()
    status, headers, body = get(demo.port, "/api/process")
    assert status == 200
    assert json.loads(body)["server_id"] == headers["x-served-by"]
    assert demo.healthy() == {"backend_1": True, "backend_2": True, "backend_3": True}
    weights = [backend["weight"] for backend in json.loads(get(demo.port, "/status")[2])["backend_servers"]]
    assert weights == [3, 2, 1]

    token = demo.entry()["token"]
    assert len(token) >= 32
    assert demo.entry()["urls"] == [f"http://127.0.0.1:{demo.port}", f"http://localhost:{demo.port}"]
    for words in (
        f"http://localhost:{demo.port}/dashboard#token={token}\n",
        (demo.tree / "dashboard.html").as_uri(),
        f"http://localhost:{demo.port}/status",
        f".venv/bin/python test_client.py http://localhost:{demo.port}\n",
    ):
        assert words in run.out
    balancer = demo.the("load_balancer.py").environ()
    assert balancer["LB_PAGE_TOKEN"] == token
    assert "LB_ALLOW_FILE_ORIGIN" not in balancer
    assert "LB_PAGE_TOKEN" not in demo.the("backend_server.py", demo.backend_ports[0]).environ()

    for folder in ("logs", "run"):  # their owner alone can read them
        assert mode(demo.tree / folder) == "0o700"
        files = list((demo.tree / folder).iterdir())
        assert len(files) >= 4 and {mode(file) for file in files} == {"0o600"}

    assert len(demo.processes()) == 5
    run.process.send_signal(signal.SIGINT)
    assert (run.end(), run.err) == (130, "")
    demo.assert_nothing_left()
    assert not (demo.tree / "run" / "access.js").exists()


def test_moved_control_paths_are_followed_and_slips_of_the_pen_told(demo: Demo) -> None:
    """It asked for /readyz where it was no more, and gave up after 30 s."""
    (port,) = free_ports(1)
    settings = {"LB_CONTROL_PREFIX": "/lb", "LB_CONTROL_PORT": str(port), "LB_ADMIN_TOKEN": "an admin's own token"}
    run = demo.ready(LB_ALGORITM="round_robin", **settings)
    assert get(demo.port, "/api/process")[0] == 200
    assert get(port, "/lb/livez")[0] == 200
    assert f"test_client.py --control http://localhost:{port}/lb http://localhost:{demo.port}\n" in run.out
    # The balancer says it in its log, where nobody would look for it.
    assert "  Warning: the variable LB_ALGORITM is ignored, there is no such setting; did you mean LB_ALGO" in run.out
    # Beside an admin token there is one for the page.
    assert demo.entry()["token"] != "an admin's own token"
    assert demo.entry()["urls"][0] == f"http://127.0.0.1:{port}/lb"
    assert f"http://localhost:{port}/lb/dashboard#token={demo.entry()['token']}\n" in run.out
    assert "an admin's own token" not in run.out + (demo.tree / "run" / "access.js").read_text()
    run.process.send_signal(signal.SIGHUP)
    assert (run.end(), run.err) == (0, "")
    demo.assert_nothing_left()


def test_what_was_decided_in_an_earlier_run_is_told_and_can_be_forgotten(demo: Demo) -> None:
    file = demo.tree / "state" / f"balancer-{demo.port}.db"
    file.parent.mkdir(exist_ok=True)
    decision = {"value": "drain", "over": "ready", "by": "local", "at": 1.0, "until": None, "before": None}
    store = Store(file)
    store.open()
    store.save({"decisions": {"default backend_2 admin_state": json.dumps(decision)}})
    store.close()
    run = demo.ready()
    assert "  Decided before, and still so: backends.backend_2.admin_state = drain\n" in run.out
    assert "  To start without: ./start_all.sh --forget\n" in run.out
    assert mode(file.parent) == "0o700"
    run.process.terminate()
    assert run.end() == 0
    run = demo.ready("--forget")
    assert "Decided before" not in run.out
    run.process.terminate()
    assert run.end() == 0


def test_a_signal_while_starting_stops_everything(demo: Demo) -> None:
    run = demo.start()
    wait_until(lambda: demo.processes("backend_server.py"))
    run.process.terminate()
    assert run.end() == 0
    demo.assert_nothing_left()


def test_nobody_reading_the_output_is_no_reason_to_end(demo: Demo) -> None:
    command = [demo.tree / "start_all.sh"]
    with running(command, env=demo.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        wait_until(lambda: connects(demo.port) and get(demo.port, "/readyz")[0] == 200)
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
    demo.assert_nothing_left()


def test_it_starts_however_python_and_the_system_are_set_and_detached_runs_until_stop(demo: Demo) -> None:
    """Without its folder in the path of modules, without docstrings, in a log that is not text, under sh."""
    odd = {"PYTHONSAFEPATH": "1", "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "LC_ALL": "C", "HOME": ""}
    run = demo.ready("--detach", **odd, LB_ACCESS_LOG_FORMAT="json", LB_ALGORITM="round_robin")
    assert (run.end(), run.err) == (0, "")
    assert "  Warning: the variable LB_ALGORITM is ignored, there is no such setting; did you mean LB_ALGO" in run.out
    assert get(demo.port, "/api/process")[0] == 200
    listed = json.loads(get(demo.port, "/algorithm")[2])["algorithms"]
    assert len(listed) >= 6 and all(len(algorithm["description"]) > 60 for algorithm in listed)
    noted = [file.read_text().splitlines() for file in (demo.tree / "run").glob("*.pid")]
    assert len(noted) == 4 and all(started == files.start_of(int(pid)) for pid, _, started, *_ in noted)
    stop = demo.start("stop", **odd)
    assert (stop.end(), stop.err) == (0, "")
    assert "Stopped balancer, backend_1, backend_2, backend_3." in stop.out
    demo.assert_nothing_left()
    again = demo.start("stop")
    assert (again.end(), again.err) == (0, "")
    assert "Nothing to stop" in again.out


def test_logs_may_be_cut_off_and_no_signal_that_asks_for_nothing_ends_anything(demo: Demo) -> None:
    """What logrotate does: copytruncate, and SIGUSR1, to have files opened again that nobody has. A balancer that is
    asked to end is no failure."""
    run = demo.ready(LB_ACCESS_LOG="true")
    everyone = demo.processes()
    assert len(everyone) == 5
    for process in everyone:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPROF, signal.SIGRTMIN):
            process.send_signal(number)
    log = demo.tree / "logs" / f"balancer-{demo.port}.log"
    assert log.stat().st_size > 0
    os.truncate(log, 0)
    assert get(demo.port, "/api/process")[0] == 200
    wait_until(lambda: "/api/process" in log.read_text())
    assert "\0" not in log.read_text()
    assert demo.processes() == everyone
    demo.the("load_balancer.py").terminate()
    assert (run.end(), run.err) == (0, "")
    demo.assert_nothing_left()


def test_a_setting_that_a_process_refuses_is_shown(demo: Demo) -> None:
    run = demo.start(RESPONSE_DELAY="long")
    run.assert_one_line_error(1, "backend_", "--delay must be a number of seconds", ".log")
    demo.assert_nothing_left()


def test_halves(demo: Demo) -> None:
    backends, balancer = demo.ready("backends"), demo.ready("balancer")
    assert get(demo.port, "/api/process")[0] == 200
    balancer.process.terminate()
    assert balancer.end() == 0
    assert not connects(demo.port)
    assert all(connects(port) for port in demo.backend_ports)
    for process in demo.processes("backend_server.py"):
        process.kill()
    backends.assert_one_line_error(1, "every backend has ended")
    demo.assert_nothing_left()


# -- What dies


def test_scale_starts_backends_as_requests_need_them(demo: Demo) -> None:
    demo.start("backends", "--scale").assert_one_line_error(2, "--scale", "does not go with backends")
    demo.start("--scale", LB_CONFIG="x.toml").assert_one_line_error(2, "unset LB_CONFIG")
    run = demo.ready("--scale", RESPONSE_DELAY="0")
    assert demo.healthy() == {"backend_1": True}
    assert get(demo.port, "/api/process")[1]["x-served-by"] == "backend_1"
    (scaled,) = json.loads(get(demo.port, "/status")[2])["scaling"]
    assert (scaled["min"], scaled["max"], scaled["wanted"]) == (1, 6, 1)
    demo.the("backend_server.py").kill()
    wait_until(lambda: demo.healthy() == {"backend_1": True} and demo.processes("backend_server.py"))
    run.process.terminate()
    assert run.end() == 0, run.err
    demo.assert_nothing_left()


def test_killed_backends_are_named_and_brought_back_by_their_command_or_by_backends(demo: Demo) -> None:
    """Whoever brings one back that way has it: the end of the demo names that and leaves it."""
    run = demo.ready()
    port = demo.backend_ports[1]
    demo.the("backend_server.py", port).kill()
    run.until("backend_2 ended (killed by SIGKILL). Start it again with:")
    assert {get(demo.port, "/api/process")[0] for _ in range(12)} == {200}
    wait_until(lambda: not demo.healthy()["backend_2"])

    command = shlex.split(run.out.split("Start it again with:\n")[1].splitlines()[0])
    with running(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as again:
        wait_until(lambda: demo.healthy()["backend_2"])
        assert json.loads(get(port, "/api/process")[2])["server_id"] == "backend_2"
        again.terminate()
    wait_until(lambda: not demo.healthy()["backend_2"])
    assert run.out.count("backend_2 ended") == 1

    kill_by_file(demo)
    run.until("backend_3 ended")
    again = demo.ready("backends")
    wait_until(lambda: demo.healthy() == {"backend_1": True, "backend_2": True, "backend_3": True})
    assert "backend_3" in again.out and "backend_1" not in again.out
    demo.start("backends").assert_one_line_error(2, "in use by a demo that runs already", "stop")
    run.process.send_signal(signal.SIGINT)
    assert (run.end(), run.err) == (130, "")
    last = run.out.splitlines()[-1]
    assert last == "Another start_all has started backend_2, backend_3 again; to stop that as well: ./start_all.sh stop"
    assert [connects(port) for port in (demo.port, *demo.backend_ports)] == [False, False, True, True]
    stop = demo.start("stop")
    assert stop.end() == 0 and "Stopped start_all." in stop.out
    assert again.end() == 0
    demo.assert_nothing_left()


def kill_by_file(demo: Demo) -> None:
    """With the command of the README, which reads the id from run/."""
    file = demo.tree / "run" / f"backend_3-{demo.backend_ports[2]}.pid"
    subprocess.run(["bash", "-c", 'kill -9 $(head -1 "$0")', file], check=True)


def test_what_a_detached_demo_has_lost_is_started_again(demo: Demo) -> None:
    """A balancer that is started anew has another token, and the old one is told to nobody."""
    demo.ready("--detach")
    kill_by_file(demo)
    wait_until(lambda: not demo.healthy()["backend_3"])
    again = demo.ready("backends", "--detach")
    assert "backend_3" in again.out and "backend_1" not in again.out
    wait_until(lambda: demo.healthy()["backend_3"])
    token = demo.entry()["token"]
    demo.the("load_balancer.py").kill()
    demo.ready("balancer")
    assert list(demo.entries()) == [f"balancer-{demo.port}"]
    assert demo.entry()["token"] != token
    assert demo.start("stop").end() == 0
    demo.assert_nothing_left()
    assert not (demo.tree / "run" / "access.js").exists()


def test_ctrl_c_during_the_imports_is_no_traceback() -> None:
    """A module that never ends to load stands for a slow disk."""
    code = "import runpy, sys; sys.argv = ['start_all.py']; runpy.run_path(sys.argv[0], run_name='__main__')"
    slow = "import sys, threading; print('loading', flush=True); threading.Event().wait()"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "argparse.py").write_text(slow)
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        with running(command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe) as process:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == b"loading\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
            assert process.stderr.read() == b""


# -- Taken ports


@pytest.mark.parametrize(("which", "setting"), [(0, "LB_PORT="), (2, "BACKEND_PORTS=")])
def test_a_taken_port_is_named_and_nothing_starts(demo: Demo, which: int, setting: str) -> None:
    port = (demo.port, *demo.backend_ports)[which]
    with socket.create_server(("127.0.0.1", port)):
        demo.start().assert_one_line_error(2, f"port {port} is in use", setting)
        assert not demo.processes()


def test_the_name_that_is_printed_leads_here_alone(demo: Demo) -> None:
    """To a browser localhost is ::1 as well, and there another program had the port."""
    with socket.create_server(("::1", demo.port), family=socket.AF_INET6):
        run = demo.ready()
        assert f"  Dashboard:  http://127.0.0.1:{demo.port}/dashboard#token=" in run.out
        assert f"dashboard.html?lb=http://127.0.0.1:{demo.port}\n" in run.out
        assert f"Warning: another program listens on [::1]:{demo.port}, where localhost leads as well" in run.out
        assert "http://localhost" not in run.out
        assert demo.entry()["urls"] == [f"http://127.0.0.1:{demo.port}"]  # who gets the token


def test_of_two_at_the_same_time_one_runs_and_stop_ends_it_in_good_order(demo: Demo) -> None:
    runs = [demo.start(), demo.start()]
    wait_until(lambda: any(run.process.poll() is not None for run in runs))
    (loser,) = [run for run in runs if run.process.poll() is not None]
    (winner,) = [run for run in runs if run is not loser]
    loser.assert_one_line_error(2, "in use")
    winner.until("Stop with")
    files = sorted((demo.tree / "run").iterdir())
    demo.start().assert_one_line_error(2, "in use by a demo that runs already", "stop")
    assert sorted((demo.tree / "run").iterdir()) == files
    assert get(demo.port, "/api/process")[0] == 200
    assert winner.process.poll() is None
    assert demo.start("stop").end() == 0
    assert (winner.end(), winner.err) == (0, "")
    demo.assert_nothing_left()


# -- In the background


def test_stop_leaves_a_process_alone_that_has_got_an_old_id(demo: Demo, tmp_path: Path) -> None:
    """Also an editor with our file in its command line, or a backend that somebody started by hand; and it believes no
    link, whatever that leads to."""
    run = demo.tree / "run"
    run.mkdir(exist_ok=True)
    script = str(demo.tree / "load_balancer.py")
    waiting = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    with running(waiting) as stranger, running([*waiting, script]) as editor:
        started = files.start_of(editor.pid)
        target = tmp_path / "target"
        for path, text in {
            run / "balancer-9000.pid": f"{stranger.pid}\nload_balancer.py\n",
            run / "backend_1-5001.pid": "999999999\nbackend_server.py\n",
            run / "backend_2-5002.pid": "rubbish",
            run / "balancer-9001.pid": f"{editor.pid}\nload_balancer.py\n{int(started) - 1}\n",
            run / "balancer-9002.pid": f"{editor.pid}\nload_balancer.py\n\n",
            target: f"{editor.pid}\nload_balancer.py\n{started}\n",
        }.items():
            path.write_text(text)
        (run / "balancer-9003.pid").symlink_to(target)
        stop = demo.start("stop")
        assert (stop.end(), stop.err) == (0, "")
        assert "Nothing to stop" in stop.out
        assert (stranger.poll(), editor.poll()) == (None, None)
        stranger.kill()
        editor.kill()
    assert target.exists()
    demo.assert_nothing_left()


def test_the_start_of_a_process_is_found_whatever_its_name(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to(shutil.which("sleep") or "sleep")
    with running([program, "60"]) as named, running(["sleep", "60"]) as later:
        wait_until(lambda: psutil.Process(named.pid).name() == program.name)
        assert 0 < int(files.start_of(named.pid)) <= int(Path(f"/proc/{later.pid}/stat").read_text().split()[21])
        named.kill()
        wait_until(lambda: not files.start_of(named.pid))  # though nobody has asked for its exit code yet


def test_stop_clears_up_after_a_start_all_that_was_killed(demo: Demo) -> None:
    run = demo.ready()
    run.process.kill()
    run.end()
    assert connects(demo.port)
    stop = demo.start("stop")
    assert (stop.end(), stop.err) == (0, "")
    demo.assert_nothing_left()


# -- The token of the dashboard, and who may see it


def test_a_token_of_the_user_s_own_is_used_and_not_printed(demo: Demo) -> None:
    own, unfit = "a token/of my own#1", {"LB_HEALTH_PATH": "/nope", "LB_HEALTH_TIMEOUT": "20"}
    run = demo.ready(LB_PAGE_TOKEN=f"{own} ", LB_ADMIN_TOKEN="an admin's own token", **unfit)
    assert demo.entry()["token"] == own
    assert demo.the("load_balancer.py").environ()["LB_PAGE_TOKEN"] == own
    assert "its token is your LB_PAGE_TOKEN" in run.out
    assert own not in run.out and "#token" not in run.out
    # Ready means checked, not healthy; it said no more than "Ready". The first check may have come before the backend.
    assert re.search(r"backend_2 gets no requests: health check (answered 404|failed)", run.out)

    demo.the("load_balancer.py").kill()
    run.assert_one_line_error(1, "the balancer ended by itself", "SIGKILL")
    demo.assert_nothing_left()
    assert not (demo.tree / "run" / "access.js").exists()


def test_a_token_of_the_user_s_own_may_be_in_a_file(tmp_path: Path) -> None:
    """The balancer prefers the file, so the page has to."""
    file = tmp_path / "token"
    file.write_text("a-token-in-a-file\n")
    given = {"LB_PAGE_TOKEN": "a-token-of-my-own", "LB_PAGE_TOKEN_FILE": str(file)}
    assert services.balancer_service(given).environment["LB_PAGE_TOKEN"] == "a-token-in-a-file"
    file.unlink()
    with pytest.raises(Failure, match=f"LB_PAGE_TOKEN_FILE={file}: No such file"):
        services.balancer_service(given)


def test_two_demos_of_one_folder_keep_apart(demo: Demo, tree: Path, tmp_path: Path) -> None:
    other = Demo(tree, tmp_path / "other")
    other.runs = demo.runs  # which the fixture ends
    first, second = demo.ready(), other.ready()
    assert demo.entry()["token"] in first.out and other.entry()["token"] in second.out
    assert sorted(demo.entries()) == sorted([f"balancer-{demo.port}", f"balancer-{other.port}"])
    kept = other.entry()
    first.process.terminate()
    assert first.end() == 0
    assert other.entries() == {f"balancer-{other.port}": kept}
    second.process.terminate()
    assert second.end() == 0
    demo.assert_nothing_left()


def test_a_link_is_replaced_and_not_written_through(demo: Demo, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    port = demo.backend_ports[1]
    for link in f"logs/backend_2-{port}.log", f"run/backend_2-{port}.pid", "run/access.js":
        (demo.tree / link).parent.mkdir(exist_ok=True)
        (demo.tree / link).symlink_to(target)
    run = demo.ready()
    assert target.read_text() == "precious" and demo.entry()
    run.process.terminate()
    assert run.end() == 0


def test_what_a_log_says_gives_the_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31m\x9b2Jb\nforged")
    assert capsys.readouterr().out == "a\\x1b[31m\\x9b2Jb\\x0aforged\n"
    assert str(Failure("a\x1b[31m")) == "a\\x1b[31m"

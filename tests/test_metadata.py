"""Each cloud's metadata service as a source of notices, against a real server on loopback that also misbehaves."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import metadata_servers
import pytest
from metadata_servers import AwsServer, AzureServer, GcpServer, Server

import trainer.__main__
import trainer.launch.__main__
from trainer.checkpoint.interval import notice_seconds
from trainer.layout import clouds
from trainer.layout.clouds import NOTICE_S
from trainer.machine import token
from trainer.notices import aws, azure, gcp, here, watcher
from trainer.notices.named import VARIABLES
from trainer.notices.named import named as name_of_cloud
from trainer.notices.notice import Notice
from trainer.notices.received import Notices
from trainer.notices.service import Service, ServiceError

SERVERS = [AwsServer, GcpServer, AzureServer]


class Heard(Notices):
    """Notices of a process, with the lines that it prints."""

    def __init__(self) -> None:
        super().__init__(25.0)
        self.lines: list[str] = []
        self.said = threading.Condition()

    def say(self, line: str) -> None:
        with self.said:
            self.lines.append(line)
            self.said.notify_all()

    def await_line(self, text: str) -> str:
        with self.said:
            assert self.said.wait_for(lambda: any(text in line for line in self.lines), 30), self.lines
            return next(line for line in self.lines if text in line)

    def await_notice(self) -> Notice:
        assert self.received.wait(30), self.lines
        found = self.first()
        assert found
        return found


@contextmanager
def listening(
    server: Server, monkeypatch: pytest.MonkeyPatch, ignored: frozenset[str] = frozenset()
) -> Iterator[Heard]:
    for key, value in {**server.env, "SKYSPOT_NOTICE_POLL_S": "0.02"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    heard = Heard()
    heard.watch(ignored, heard.say)
    try:
        yield heard
    finally:
        heard.end()
        assert not [one for one in threading.enumerate() if one.name == "notices"], "a thread was left behind"


# -- what each cloud announces -----------------------------------------------------------------------------------------


def test_aws_a_notice_is_heard_with_the_seconds_that_are_left(monkeypatch) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        assert heard.await_line("notices") == "notices: aws metadata, SIGTERM"
        server.await_requests()
        assert heard.first() is None
        server.announce(90)
        found = heard.await_notice()
        assert found.kind == "aws-notice"
        assert 85 < found.seconds_left <= 91


@pytest.mark.parametrize("action", ["noop", "", None])
def test_aws_an_action_that_takes_no_machine_is_none(monkeypatch, action: str | None) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.announce(90)
        assert server.action
        server.action = server.action.replace('"terminate"', "null" if action is None else f'"{action}"')
        server.await_requests()
        assert heard.first() is None


def test_aws_a_token_that_has_expired_is_fetched_anew(monkeypatch) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.await_requests()
        server.token = "another"
        server.announce(60)
        heard.await_notice()
        assert server.requests.count("PUT /latest/api/token") == 2


def test_aws_a_recommendation_asks_for_a_save_once(monkeypatch) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.rebalance = '{"noticeTime": "2026-11-05T08:22:00Z"}'
        assert heard.hinted.wait(30)
        assert "saving now" in heard.await_line("expects")
        heard.hinted.clear()
        server.await_requests()
        server.rebalance = '{"noticeTime": "2026-11-05T08:32:00Z"}'  # Within an hour of the first.
        server.await_requests()
        assert not heard.hinted.is_set()
        assert heard.first() is None, "training goes on"
        server.announce(60)
        heard.await_notice()


def test_aws_a_recommendation_asks_for_a_save_again_after_an_hour(monkeypatch) -> None:
    monkeypatch.setattr(watcher, "HINT_EVERY_S", 0.0)
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        for minute in (1, 2):
            server.rebalance = f'{{"noticeTime": "2026-11-05T08:0{minute}:00Z"}}'
            assert heard.hinted.wait(30)
            heard.hinted.clear()


def test_gcp_a_preemption_is_heard_by_a_request_that_waits(monkeypatch) -> None:
    with GcpServer() as server, listening(server, monkeypatch) as heard:
        heard.await_line("notices: gcp metadata, SIGTERM")
        with server.changed:
            assert server.changed.wait_for(lambda: any("wait_for_change=true" in one for one in server.requests), 30)
        requests = len(server.requests)
        assert heard.first() is None, "FALSE is no preemption"
        server.announce(30)
        found = heard.await_notice()
        assert (found.kind, found.seconds_left) == ("gcp-notice", 30.0)
        assert len(server.requests) == requests == 2, "it asked once, and waited once"


def test_gcp_a_preemption_that_was_announced_before_is_heard(monkeypatch) -> None:
    with GcpServer() as server:
        server.value = "TRUE"
        with listening(server, monkeypatch) as heard:
            heard.await_notice()


def test_gcp_a_service_that_does_not_wait_is_not_asked_without_a_pause(monkeypatch) -> None:
    with GcpServer() as server:
        server.waits = False
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        source = here.source_of(name_of_cloud())
        assert source
        source.ask()
        assert source.poll_s == 0, "the next request waits by itself"
        source.ask()
        assert source.poll_s > 0


@pytest.mark.parametrize("value", ["true", "NONE", "", "FALSE\nTRUE"])
def test_gcp_only_true_is_true(monkeypatch, value: str) -> None:
    with GcpServer() as server:
        server.value = value
        with listening(server, monkeypatch) as heard:
            heard.await_line("gives no answer")
            assert heard.first() is None


def test_gcp_a_longer_notice_is_what_the_option_says(monkeypatch) -> None:
    monkeypatch.setenv("SKYSPOT_GCP_NOTICE_S", "120.0")
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", '{"cloud": "GCP"}')
    assert notice_seconds(25.0) == 120, "the save interval counts on it too"
    with GcpServer() as server, listening(server, monkeypatch) as heard:
        server.announce(30)
        assert heard.await_notice().seconds_left == 120


def test_gcp_a_second_preemption_after_a_new_start_of_the_instance_is_heard(monkeypatch, tmp_path: Path) -> None:
    """The disk, and with it the machine's token, stays when an instance is stopped."""
    monkeypatch.setattr(token, "BOOT_ID", tmp_path / "boot_id")
    token.BOOT_ID.write_text("first\n")
    with GcpServer() as server:
        server.value = "TRUE"
        with listening(server, monkeypatch) as heard:
            ended = frozenset({heard.await_notice().id})
        with listening(server, monkeypatch, ended) as heard:
            heard.await_line("it ended an attempt here before")
            assert heard.first() is None
        token.BOOT_ID.write_text("second\n")
        with listening(server, monkeypatch, ended) as heard:
            heard.await_notice()


@pytest.mark.parametrize(("options", "seconds"), [([], 30), (["--gcp-notice", "120"], 120)])
def test_gcp_the_option_sets_the_notice_of_all_processes(monkeypatch, tmp_path: Path, options, seconds: float) -> None:
    (tmp_path / "script.py").touch()
    programs = [
        (trainer.__main__, [*options, "--checkpoint-dir", str(tmp_path / "run"), "--cpu"]),
        (trainer.launch.__main__, [*options, "--cpu", str(tmp_path / "script.py")]),
    ]
    for program, arguments in programs:
        monkeypatch.setenv(clouds.GCP_NOTICE, "")
        monkeypatch.setattr(sys, "argv", ["", *arguments])
        launched: list[float | None] = []
        monkeypatch.setattr(program, "launch", lambda *_, seen=launched, **__: seen.append(clouds.notice_s("gcp")) or 0)
        assert program.main() == 0
        assert launched == [seconds], program.__name__


def test_azure_a_preempt_event_of_this_machine_is_heard(monkeypatch) -> None:
    with AzureServer() as server, listening(server, monkeypatch) as heard:
        server.await_requests()
        server.schedule("Preempt", 45)
        found = heard.await_notice()
        assert found.kind == "azure-notice"
        assert 40 < found.seconds_left <= 46


@pytest.mark.parametrize("kind", ["Freeze", "Reboot", "Redeploy", "Terminate", "preempt"])
def test_azure_another_event_is_said_once_and_ignored(monkeypatch, kind: str) -> None:
    with AzureServer() as server, listening(server, monkeypatch) as heard:
        server.schedule(kind, 300)
        assert kind in heard.await_line("does not take this machine")
        server.await_requests()
        assert heard.first() is None
        assert len([line for line in heard.lines if kind in line]) == 1


def test_azure_a_preempt_event_of_another_machine_is_not_this_ones(monkeypatch) -> None:
    with AzureServer() as server, listening(server, monkeypatch) as heard:
        server.schedule("Preempt", 45, name="spot-vm_1")
        server.await_requests()
        assert heard.first() is None
        assert heard.lines == ["notices: azure metadata, SIGTERM"]


@pytest.mark.parametrize("when", ["soon", "2126-13-45", "Mon, 99 Jan 2026 25:61:00 GMT", 7, ["x"], {"at": None}])
@pytest.mark.parametrize("kind", ["Freeze", "Preempt"])
def test_azure_an_event_with_an_odd_time_hides_no_other(monkeypatch, kind: str, when: object) -> None:
    """A Preempt of this machine whose time cannot be read leaves the least notice."""
    with AzureServer() as server:
        server.schedule(kind, 100)
        server.events[0]["NotBefore"] = when
        server.schedule("Preempt", 45)
        server.events[1]["EventId"] = "the-second"
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        found = azure.Azure().ask()
    assert [(one.id, one.takes_machine) for one in found] == [
        (f"azure/{kind}-0", kind == "Preempt"), ("azure/the-second", True),
    ]  # fmt: skip
    assert (found[0].seconds_left, round(found[1].seconds_left) in range(43, 47)) == (30.0, True)


@pytest.mark.parametrize(("status", "seconds"), [("Started", 0.0), ("Scheduled", 30.0)])
def test_azure_an_event_without_a_time_leaves_the_least_notice(monkeypatch, status: str, seconds: float) -> None:
    with AzureServer() as server, listening(server, monkeypatch) as heard:
        server.schedule("Preempt", None, status=status)
        assert heard.await_notice().seconds_left == seconds


def test_azure_the_first_answer_may_take_long(monkeypatch) -> None:
    with AzureServer() as server:
        limit_s = 0.2

        def late(handler: BaseHTTPRequestHandler) -> None:
            if "scheduledevents" in handler.path:
                server.over.wait(3 * limit_s)
            status, text, headers = server.answer(handler.command, handler.path, handler.headers)
            metadata_servers.send(handler, status, text.encode(), headers)

        server.misbehave = late
        server.schedule("Preempt", 100)
        monkeypatch.setattr(azure, "REQUEST_S", limit_s)
        with listening(server, monkeypatch) as heard:
            heard.await_notice()
    assert azure.FIRST_S >= 120, "it can take 2 minutes"


# -- what is not believed ----------------------------------------------------------------------------------------------


def test_a_notice_that_ended_an_attempt_here_before_is_ignored_and_a_new_one_is_not(monkeypatch) -> None:
    with AwsServer() as server:
        server.action = '{"action": "terminate", "time": "2126-01-01T00:00:00Z"}'
        with listening(server, monkeypatch, frozenset({"aws/2126-01-01T00:00:00Z"})) as heard:
            heard.await_line("it ended an attempt here before")
            server.await_requests()
            assert heard.first() is None
            server.announce(100)
            heard.await_notice()


def test_a_time_beyond_the_clouds_longest_notice_is_cut(monkeypatch) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.announce(100_000)
        assert heard.await_notice().seconds_left == 120.0


@pytest.mark.parametrize("seconds", [-60, -5 * 3600])  # The second: a local time that is written as UTC.
def test_a_time_that_has_passed_is_said_and_ignored(monkeypatch, seconds: float) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.announce(seconds)
        heard.await_line("ignored: its time passed")
        server.await_requests()
        assert heard.first() is None


@pytest.mark.parametrize("zone", ["", "+00:00", "Z"])
def test_a_time_is_taken_as_utc_where_it_names_no_zone(monkeypatch, zone: str) -> None:
    with AwsServer() as server, listening(server, monkeypatch) as heard:
        server.announce(90)
        assert server.action
        server.action = server.action.replace("Z", zone)
        assert 80 < heard.await_notice().seconds_left <= 91


@pytest.mark.parametrize("make", SERVERS)
@pytest.mark.parametrize("misbehave", metadata_servers.MISBEHAVIOUR)
def test_a_service_that_lies_is_no_notice_and_is_asked_again(monkeypatch, make: type[Server], misbehave) -> None:
    with make() as server:
        server.misbehave = misbehave
        with listening(server, monkeypatch) as heard:
            heard.await_line("gives no answer")
            server.await_requests()
            assert heard.first() is None
            assert "GET /latest/elsewhere" not in server.requests
            server.misbehave = None
            if isinstance(server, AwsServer):
                server.announce(60)
            elif isinstance(server, GcpServer):
                server.announce(30)
            else:
                assert isinstance(server, AzureServer)
                server.schedule("Preempt", 60)
            heard.await_notice()


@pytest.mark.parametrize("make", SERVERS)
def test_a_service_that_is_not_there_is_asked_again(monkeypatch, make: type[Server]) -> None:
    with make() as server:
        pass
    with listening(server, monkeypatch) as heard:
        heard.await_line("gives no answer")
        assert heard.first() is None


# -- what must not be held up ------------------------------------------------------------------------------------------


def drip(server: Server) -> Callable[[BaseHTTPRequestHandler], None]:
    def one_byte_after_the_other(handler: BaseHTTPRequestHandler) -> None:
        try:
            while not server.over.wait(0.01):
                handler.wfile.write(b"H")
        except OSError:
            pass

    return one_byte_after_the_other


def silent(server: Server) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: server.over.wait() and None


@pytest.mark.parametrize("manner", [drip, silent])
def test_a_request_has_one_time_limit_in_all(manner) -> None:
    with AwsServer() as server:
        server.misbehave = manner(server)
        service = Service(server.env[server.variable])
        with pytest.raises(ServiceError, match="takes too long"):
            service.ask("/", seconds=0.2)


@pytest.mark.parametrize("manner", [drip, silent])
def test_a_request_under_way_ends_with_the_attempt(manner) -> None:
    with AwsServer() as server:
        server.misbehave = manner(server)
        service = Service(server.env[server.variable])
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                service.ask("/", seconds=3600)
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        with server.changed:
            assert server.changed.wait_for(lambda: server.requests, 30)
        service.close()
        thread.join(30)
        assert not thread.is_alive()
        assert failed
        with pytest.raises(ServiceError):
            service.ask("/")


def test_a_request_that_waits_for_a_change_ends_with_the_attempt(monkeypatch) -> None:
    with GcpServer() as server, listening(server, monkeypatch), server.changed:
        assert server.changed.wait_for(lambda: any("wait_for_change=true" in one for one in server.requests), 30)
    # `listening` has seen the thread end.


# -- which cloud -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cloud is named, and the address of all metadata services is a closed port on loopback."""
    for name in ("SKYPILOT_CLUSTER_INFO", "SKYSPOT_CLOUD", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for module in (aws, azure, gcp):
        monkeypatch.setattr(module, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("named", "expected"),
    [("AWS", "aws"), ("GCP", "gcp"), ("Azure", "azure"), ("Lambda", None), ("Kubernetes", None), ("RunPod", None),
     ("Slurm", None)],
)  # fmt: skip
@pytest.mark.usefixtures("_nowhere")
def test_skypilots_variables_name_the_cloud(monkeypatch, named: str, expected: str | None) -> None:
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", f'{{"cloud": "{named}"}}')
    assert name_of_cloud() == named.lower()
    source = here.source_of(name_of_cloud())
    assert (source and source.cloud) == expected


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("make", SERVERS)
def test_a_machine_that_nothing_is_said_of_is_found_by_its_service(monkeypatch, make: type[Server]) -> None:
    with make() as server:
        for module in (aws, azure, gcp):
            monkeypatch.setattr(module, "ENDPOINT", server.env[server.variable])
        source = here.probe()
        assert source
        assert source.cloud == {"AWS": "aws", "GCE": "gcp", "SKY": "azure"}[make.variable[:3]]


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("misbehave", [*metadata_servers.MISBEHAVIOUR, None])
def test_a_machine_without_a_service_has_signals_alone(monkeypatch, misbehave) -> None:
    with AwsServer() as server, ExitStack() as stack:
        if misbehave:
            server.misbehave = misbehave
            for module in (aws, azure, gcp):
                monkeypatch.setattr(module, "ENDPOINT", server.env[server.variable])
        heard = Heard()
        heard.watch(frozenset(), heard.say)
        stack.callback(heard.end)
        assert heard.await_line("notices") == "notices: SIGTERM"


@pytest.mark.usefixtures("_nowhere")
def test_a_silent_service_is_waited_for_no_longer_than_the_limit(monkeypatch) -> None:
    """A request of an hour is under way when the limit ends."""
    monkeypatch.setattr(here, "PROBE_S", 0.2)
    monkeypatch.setitem(Service.ask.__kwdefaults__, "seconds", 3600.0)
    with AwsServer() as server:
        server.misbehave = silent(server)
        for module in (aws, azure, gcp):
            monkeypatch.setattr(module, "ENDPOINT", server.env[server.variable])
        found: list[object] = []
        probing = threading.Thread(target=lambda: found.append(here.probe()), daemon=True)
        probing.start()
        probing.join(30)
        assert found == [None]
        end = time.monotonic() + 30
        while any(one.name == "probe" for one in threading.enumerate()):  # Their requests were ended.
            assert time.monotonic() < end
            time.sleep(0.01)


def test_slurm_sends_another_signal(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    heard = Heard()
    heard.watch(frozenset(), heard.say)
    assert heard.await_line("notices") == "notices: SIGTERM, SIGUSR1"
    heard.end()


def test_each_source_has_its_notice_and_its_ending() -> None:
    from trainer.attempt.ending import NOTICE, STOPS

    assert set(here.SOURCES) <= set(NOTICE_S)
    assert all(STOPS[f"{cloud}-notice"] is NOTICE for cloud in here.SOURCES)
    assert set(VARIABLES.values()) == set(here.SOURCES)

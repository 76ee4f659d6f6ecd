"""Real servers under their own clients' load, spliced: no error, and the counters say spliced."""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import servers
from tests.sandbox import wait_until
from tests.splice.stage import Stage

pytestmark = pytest.mark.kernel

NGINX = """
daemon off; master_process off; error_log stderr; pid nginx.pid;
events { worker_connections 256; }
http {
  access_log off; keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server { listen 127.0.0.1:8080; root .; }
  server { listen 127.0.0.1:8081 http2; root .; }
}
"""

NODE = """
const http = require('http');
const server = http.createServer((request, response) => {
  let body = '';
  request.on('data', part => body += part);
  request.on('end', () => response.end('answer to ' + body));
});
server.listen(8090, '127.0.0.1', () => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 8 });
  let left = 2000, failed = 0;
  const done = bad => {
    failed += bad;
    if (--left) return;
    console.log('failed ' + failed);
    agent.destroy();
    server.close(() => process.exit(failed ? 1 : 0));
  };
  for (let i = 0; i < 2000; i++) {
    const text = 'question ' + i + ' ' + 'x'.repeat(i * 7 % 5000);
    const options = { port: 8090, host: '127.0.0.1', method: 'POST', agent };
    const request = http.request(options, response => {
      let body = '';
      response.on('data', part => body += part);
      response.on('end', () => done(body !== 'answer to ' + text));
    });
    request.on('error', () => done(1));
    request.end(text);
  }
});
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


@contextlib.contextmanager
def spliced(stage: Stage, share: float) -> Iterator[None]:
    """Check that in the body at least *share* of the bytes that pairs send are spliced."""

    def counted() -> tuple[int, int, int]:
        stage.sweeper.sweep()  # brings the counters up to date
        return stage.counters()[:3]

    pairs, fast, slow = counted()
    yield
    more = [now - before for now, before in zip(counted(), (pairs, fast, slow), strict=True)]
    assert more[0] > 0
    assert more[1] >= share * (more[1] + more[2]), more


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_redis(stage: Stage) -> None:
    with servers.redises(6400) as pair, spliced(stage, 0.9):
        port = str(pair.ports["one"])
        common = ("redis-benchmark", "-p", port, "-n", "5000", "-c", "20", "-q")
        for options in (("-t", "set,get,incr,lpush,lrange_100"), ("-P", "16"), ("-d", "3000")):
            said = run(*common, *options, *(("-t", "set,get") if options[0] != "-t" else ()))
            assert "requests per second" in said
            assert not re.search("error|warn", said, re.IGNORECASE)


def test_postgres(stage: Stage) -> None:
    with servers.postgreses(5500) as pair:
        where = ("-h", "127.0.0.1", "-p", str(pair.ports["one"]), "-U", "postgres", "postgres")
        run("pgbench", "-i", "-q", *where)
        with spliced(stage, 0.9):
            for options in (("-S", "-t", "300"), ("-t", "50"), ("-S", "-C", "-t", "10")):
                said = run("pgbench", "-c", "4", "-n", *options, *where)
                assert "number of failed transactions: 0" in said
                assert "aborted" not in said


def test_nginx_and_http2(stage: Stage) -> None:
    with servers.own_directory() as directory:
        directory.chmod(0o755)
        (directory / "nginx.conf").write_text(NGINX)
        (directory / "page").write_bytes(b"x" * 2000)
        (directory / "large").write_bytes(b"x" * 300_000)
        command = ["nginx", "-p", f"{directory}/", "-e", "stderr", "-c", "nginx.conf"]
        with servers.running(command, lambda: not subprocess.run(
            ["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:8080/page"], check=False
        ).returncode):  # fmt: skip
            with spliced(stage, 0.5):
                for header in ("Connection: keep-alive", "Connection: close"):
                    said = run("wrk", "-t1", "-c8", "-d1", "-H", header,
                               "http://127.0.0.1:8080/page")  # fmt: skip
                    assert "Requests/sec" in said
                    assert not re.search("Non-2xx|Socket errors", said), said
            with spliced(stage, 0.1):
                said = run("h2load", "-n", "2000", "-c", "8", "-m", "10",
                           "http://127.0.0.1:8081/page")  # fmt: skip
                assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in said
            # Larger than the budget: these cross to the stack on the way.
            said = run("h2load", "-n", "200", "-c", "4", "-m", "5", "http://127.0.0.1:8081/large")
            assert "200 succeeded, 0 failed, 0 errored, 0 timeout" in said


def test_node(stage: Stage, tmp_path: Path) -> None:
    script = tmp_path / "both.js"
    script.write_text(NODE)
    with spliced(stage, 0.9):
        assert "failed 0" in run("node", str(script))


def test_nothing_is_left(stage: Stage) -> None:
    wait_until(lambda: not stage.entries(), "an empty sockhash")

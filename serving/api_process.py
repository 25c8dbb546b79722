"""One of several API processes: `python -m serving.api_process`, its Job as JSON on stdin. Prints a line when it listens."""

import signal
import subprocess
import sys

import msgspec

from jaxllm.config import EngineConfig
from jaxllm.request import EngineDeadError
from serving import run
from serving.cli import set_up_logging, stop
from serving.options import ServerOptions


class Job(msgspec.Struct):
    """What an API process must know to serve somebody else's engine process."""

    config: EngineConfig
    options: ServerOptions
    address: str
    engine: int  # its process id

    def start(self) -> subprocess.Popen:
        worker = subprocess.Popen([sys.executable, "-m", "serving.api_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert worker.stdin is not None
        worker.stdin.write(msgspec.json.encode(self) + b"\n")
        worker.stdin.flush()
        return worker


def main() -> int:
    from serving.remote_engine import AnothersProcess, RemoteEngine, StartFailed

    set_up_logging()
    signal.signal(signal.SIGTERM, stop)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        engine = RemoteEngine(job.config, AnothersProcess(job.address, job.engine)).wait()
        with run.bind(job.options) as listener:
            run.serve(engine, job.options, listener, lambda: print("ready", flush=True))
    except (StartFailed, EngineDeadError):
        return 1  # who started this process says it
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())

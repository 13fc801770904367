"""A small Modal server for the tests of the local Modal: says who it is, then echoes."""

import json
import os
import threading
import time

import modal
from websockets.sync.server import Server, ServerConnection, serve


class EchoServer:
    """Loads before the snapshot and listens after it."""

    @modal.enter(snap=True)  # type: ignore[untyped-decorator]  # mypy skips modal
    def load(self) -> None:
        if "ECHO_FAILS" in os.environ:
            raise RuntimeError("the weights are missing")
        time.sleep(float(os.environ.get("ECHO_LOAD_SECONDS", "0")))
        self.loaded_by = os.getpid()

    @modal.enter(snap=False)  # type: ignore[untyped-decorator]  # mypy skips modal
    def listen(self) -> None:
        about = {
            "container": os.environ["MODAL_TASK_ID"],
            "secret": os.environ.get("ECHO_SECRET", ""),
            "loaded_by": self.loaded_by,
            "pid": os.getpid(),
        }

        def echo(connection: ServerConnection) -> None:
            assert connection.request
            headers = [name.lower() for name, _ in connection.request.headers.raw_items()]
            connection.send(json.dumps({**about, "headers": headers}))
            for message in connection:
                connection.send(message)

        address = os.environ["TRUNKLINE_HOST"], int(os.environ["TRUNKLINE_PORT"])
        self.server: Server = serve(echo, *address, max_size=None)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @modal.exit()  # type: ignore[untyped-decorator]  # mypy skips modal
    def leave(self) -> None:
        print("exit hook", flush=True)
        self.server.shutdown()


class Plain:
    """Without a snapshot."""

    @modal.enter()  # type: ignore[untyped-decorator]  # mypy skips modal
    def begin(self) -> None:
        address = os.environ["TRUNKLINE_HOST"], int(os.environ["TRUNKLINE_PORT"])
        self.server: Server = serve(lambda connection: None, *address)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

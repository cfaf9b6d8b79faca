"""As much of the Hugging Face Hub on this machine as an upload needs: repositories, and commits of files in them."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """`files` of each repository, who may write, and which repositories are private."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.refused_commits = 0
        stored: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(404, {"error": "nothing of that kind here"})

            def do_PUT(self) -> None:
                content = self.content()
                oid = self.path.rsplit("/", 1)[-1]
                assert hashlib.sha256(content).hexdigest() == oid
                stored[oid] = content
                self.answer(200, {})

            def do_POST(self) -> None:
                content = self.content()
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer(401, {"error": "Invalid username or password."})
                    return
                if self.path == "/api/repos/create":
                    asked = json.loads(content)
                    name = f"{asked['organization']}/{asked['name']}"
                    if name in hub.files:
                        self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                        return
                    hub.files[name], hub.private[name] = {}, asked.get("visibility") == "private"
                    self.answer(200, {"url": f"{hub.url}/{name}"})
                elif self.path == "/api/validate-yaml":
                    self.answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith(("safetensors", "onnx")) else "regular",
                            "shouldIgnore": False,
                        }
                        for each in json.loads(content)["files"]
                    ]
                    self.answer(200, {"files": files})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        each | {"actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                        for each in json.loads(content)["objects"]
                    ]
                    self.answer(200, {"transfer": "basic", "objects": objects})
                elif "/commit/" in self.path:
                    self.commit(content)
                else:
                    self.answer(404, {"error": self.path})

            def commit(self, content: bytes) -> None:
                if hub.refused_commits:
                    hub.refused_commits -= 1
                    self.answer(403, {"error": "quota exceeded"})
                    return
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for line in map(json.loads, content.splitlines()):
                    value = line["value"]
                    match line["key"]:
                        case "header":
                            hub.commits.append(value["summary"])
                        case "file":
                            assert value["encoding"] == "base64"
                            hub.files[name][value["path"]] = base64.b64decode(value["content"])
                        case "lfsFile":
                            hub.files[name][value["path"]] = stored[value["oid"]]
                        case key:
                            raise AssertionError(key)
                self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

            def content(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, status: int, what: dict[str, Any]) -> None:
                body = json.dumps(what).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

"""A server on this machine that answers as the hub does to commits and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class HubStub(ThreadingHTTPServer):
    """Keeps what is committed; ``repositories[repo_id]`` are its commits, oldest first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.tokens: set[str | None] = set()
        # asks often whether to stop, or every test would wait half a second for it
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo_id: str, number: int) -> str:
        return hashlib.sha1(f"{repo_id} {number}".encode()).hexdigest()

    def files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a revision."""
        commits = self.repositories.get(repo_id, [])
        for number, files in reversed(list(enumerate(commits))):
            if revision in ("main", self.sha(repo_id, number)):
                return self.sha(repo_id, number), files
        return None


class _Handler(BaseHTTPRequestHandler):
    server: HubStub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if repo_id == "someone/forbidden":
                return self._answer(403, {"error": "you may not"})
            self.server.repositories.setdefault(repo_id, [])
            return self._answer(200, {"url": f"{self.server.endpoint}/{repo_id}"})
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        repo_id, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            return self._answer(200, {"files": [_as_is(f) for f in json.loads(body)["files"]]})
        assert action == "commit"
        changes = [json.loads(line) for line in body.splitlines()]
        added = {
            change["value"]["path"]: base64.b64decode(change["value"]["content"])
            for change in changes
            if change["key"] == "file"
        }
        commits = self.server.repositories[repo_id]
        commits.append({**(commits[-1] if commits else {}), **added})
        sha = self.server.sha(repo_id, len(commits) - 1)
        url = f"{self.server.endpoint}/{repo_id}/commit/{sha}"
        return self._answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def do_HEAD(self):
        self._send_file(with_body=False)

    def do_GET(self):
        self._send_file(with_body=True)

    def _send_file(self, *, with_body):
        parts = self.path.split("?")[0].strip("/").split("/", 4)
        if parts[0] == "api":  # what is asked about a repository after a refusal
            return self._answer(403, {"error": "you may not"}, with_body=with_body)
        owner, name, _, revision, path = parts
        found = self.server.files(f"{owner}/{name}", revision)
        if found is None or path not in found[1]:
            code = "RepoNotFound" if found is None else "EntryNotFound"
            return self._answer(404, {}, {"X-Error-Code": code}, with_body=with_body)
        sha, files = found
        etag = hashlib.sha1(files[path]).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}
        return self._answer(200, files[path], headers, with_body=with_body)

    def _answer(self, status, body, headers=None, *, with_body=True):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def _as_is(file):
    return {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}

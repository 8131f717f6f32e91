"""An OpenAI-compatible endpoint as a process of its own: ``python chat_server.py`` prints its port.

The address chooses how it behaves: ``http://127.0.0.1:PORT/BEHAVIOUR/v1``.

good     judges and rewrites as the guard asks, held to the schema; whatever holds "corpse" is harmful
plain    the same, but knows no ``response_format`` and answers in one line of text
slow     answers when the client has hung up; drip sends a byte every 50 ms until then
rubbish  a web page; liar: valid JSON that is no answer to the question
dead     hangs up; cut: hangs up in the middle of the answer; down: status 503
"""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from select import select

SAFE = "a mossy fallen tree on the beach at dawn, wide shot"


def answer(body, *, plain):
    """What a well-behaved model says: the schema, or the system message of a plain one, tells what is asked."""
    system, data = body["messages"][0]["content"], json.loads(body["messages"][-1]["content"])
    harmful = "corpse" in data["caption"]
    if plain:
        words = ("HARMFUL", "SAFE") if "HARMFUL" in system else ("BAD", "GOOD")
        return json.dumps({"prompt": SAFE}) if '{"prompt"' in system else f"{words[not harmful]}: as I see it"
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    if "prompt" in fields:
        return json.dumps({"prompt": SAFE})
    return json.dumps({"reason": "as I see it", "verdict": fields["verdict"]["enum"][harmful]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour = self.path.split("/")[1]
        if behaviour == "slow":
            self.hung_up(within=None)
        if behaviour == "dead":
            return self.connection.close()
        if behaviour == "down":
            return self.send(503, {"error": {"message": "overloaded"}})
        if behaviour == "rubbish":
            return self.send(200, b"<html>It works!</html>", kind="text/html")
        if behaviour == "plain" and "response_format" in body:
            return self.send(400, {"error": {"message": "unknown field: response_format"}})
        text = '{"answer": 42}' if behaviour == "liar" else answer(body, plain=behaviour == "plain")
        message = {"role": "assistant", "content": text}
        self.send(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}, behaviour)

    def send(self, status, value, behaviour="", *, kind="application/json"):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) + 10_000 * (behaviour == "drip")))
            self.end_headers()
            while behaviour == "drip" and not self.hung_up(within=0.05):
                self.wfile.write(b" ")
            self.wfile.write(data[: len(data) // 2] if behaviour == "cut" else data)
        except OSError:
            pass  # the client gave up waiting

    def hung_up(self, within):
        """Whether the client, who says nothing more, closes the connection within so many seconds; None is for ever."""
        return bool(select([self.connection], [], [], within)[0])

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()

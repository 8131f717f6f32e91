"""An OpenAI-compatible endpoint that sees images, in a thread: the address chooses how it behaves, ``URL/BEHAVIOUR/v1``.

good   says yes of a red image, no of others, and only to the question about violence
prose  the same in a sentence; fenced in a code fence; torn answers prose to every second question; moody changes its mind
dead   hangs up; down: status 503; fading answers three questions, then hangs up for ever
"""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def look(body):
    """Whether the image is red and the question is about violence, and what was sent."""
    text, image = body["messages"][-1]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2])
    with Image.open(io.BytesIO(data)) as opened:
        red, green, blue = np.asarray(opened.convert("RGB"), dtype=float).mean((0, 1))
        size, info = opened.size, dict(opened.info)
    return {
        "harmful": red > 1.5 * max(green, blue) and "Violence" in json.loads(text["text"])["question"],
        "size": size,
        "info": info,
        "body": body,
    }


class Endpoint:
    """The server; ``seen`` holds what `look` found in each request."""

    def __init__(self):
        self.seen = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                behaviour, number = self.path.split("/")[1], len(endpoint.seen)
                if behaviour == "dead" or (behaviour == "fading" and number >= 3):
                    return self.connection.close()
                endpoint.seen.append(look(body))
                word = "yes" if endpoint.seen[-1]["harmful"] else "no"
                if behaviour == "moody" and number % 2:
                    word = "no" if word == "yes" else "yes"
                text = json.dumps({"answer": word})
                if behaviour == "prose" or (behaviour == "torn" and number % 2):
                    text = f"I would say {word}, all things considered."
                if behaviour == "fenced":
                    text = f"```json\n{text}\n```"
                message = {"role": "assistant", "content": text}
                data = json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()
                self.send_response(503 if behaviour == "down" else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def url(self, behaviour):
        return f"{self.address}/{behaviour}/v1"


@contextmanager
def running():
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()

"""A visitor of the page of `sslam app` without a browser, in the protocol of its own scripts."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen


PATIENCE = 120  # seconds: a machine may be busy


def get(address: str, values: dict | None = None) -> bytes:
    """The body of an answer, to JSON if `values` are given."""
    body = None if values is None else json.dumps(values).encode()
    with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=PATIENCE) as response:
        return response.read()


def messages_of_example(address: str, name: str) -> Iterator[dict[str, Any]]:
    """What the page tells a visitor who chooses an example, as it comes."""
    config = json.loads(get(f"{address}/config"))
    ids = {component["props"].get("elem_id"): component["id"] for component in config["components"]}
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    chosen = next(found for found in config["dependencies"] if found["targets"] == [[ids["example"], "change"]])
    computed = next(found for found in config["dependencies"] if found["trigger_after"] == chosen["id"])
    get(f"{address}/gradio_api/run/predict", {"data": [name], "fn_index": chosen["id"], "session_hash": "visitor"})
    data = [values[i] for i in computed["inputs"]]
    get(f"{address}/gradio_api/queue/join", {"data": data, "fn_index": computed["id"], "session_hash": "visitor"})
    with urlopen(f"{address}/gradio_api/queue/data?session_hash=visitor", timeout=PATIENCE) as lines:
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def choose_example(address: str, name: str) -> list[Any]:
    """What the components show in the end."""
    for message in messages_of_example(address, name):
        if message["msg"] == "process_completed":
            assert message["success"], message
            return message["output"]["data"]
    raise AssertionError("the page did not answer")

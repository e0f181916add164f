"""Runs a command in a container, twice: with functions.run and with functions.execute.

    python client.py IMAGE [ARGUMENT ...]

NATS_URL names the server, nats://localhost:4222 by default.
Needs nats-py: pip install -r requirements.txt
"""

import asyncio
import base64
import json
import os
import sys
import uuid

import nats
from nats.errors import NoRespondersError


def bytes_of(outcome: dict, stream: str) -> bytes:
    """One of the outcome's streams; bytes that are not UTF-8 come in base64."""
    if outcome[f"{stream}_encoding"] == "base64":
        return base64.b64decode(outcome[stream])
    return outcome[stream].encode()


async def run(nc, request: dict, patience: float = 60) -> dict:
    """Asks for a run and waits for its outcome; comes back later while all slots are taken."""
    deadline = asyncio.get_running_loop().time() + patience
    delay = 0.1
    while True:
        left = deadline - asyncio.get_running_loop().time()
        reply = await nc.request("functions.run", json.dumps(request).encode(), timeout=left)
        outcome = json.loads(reply.data)
        busy = outcome.get("error", {}).get("code") == "busy"
        if not busy or left < delay:
            return outcome
        await asyncio.sleep(delay)
        delay = min(2 * delay, 2)


async def execute(nc, request: dict, patience: float = 60):
    """Hands in a request and waits for the message about it on functions.results.

    A service would keep one subscription open for all its jobs and tell them apart by Job-Id.
    """
    job_id = str(uuid.uuid4())
    # First listen, then ask: NATS keeps nothing for those who come late.
    results = await nc.subscribe("functions.results")
    await nc.flush()
    body = json.dumps({**request, "id": job_id}).encode()
    reply = json.loads((await nc.request("functions.execute", body, timeout=patience)).data)
    # Where a stream keeps the requests, the reply is the server's: it has this one, or why not. Where none does, the
    # reply is the outcome, which has a status.
    if "error" in reply and "status" not in reply:
        raise RuntimeError(f"not accepted: {reply['error']['description']}")

    async def mine():
        async for message in results.messages:
            if message.headers["Job-Id"] == job_id:
                return message

    message = await asyncio.wait_for(mine(), patience)
    await results.unsubscribe()
    return message


async def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    request = {"image_reference": sys.argv[1], "parameter": sys.argv[2:]}
    nc = await nats.connect(os.environ.get("NATS_URL", "nats://localhost:4222"))
    try:
        outcome = await run(nc, request)
        print("run:", outcome["status"], outcome.get("exit_code", "-"), flush=True)
        sys.stdout.buffer.write(bytes_of(outcome, "stdout"))
        sys.stderr.buffer.write(bytes_of(outcome, "stderr"))
        if "error" in outcome:
            print(outcome["error"]["code"], outcome["error"]["message"], file=sys.stderr)

        message = await execute(nc, request)
        headers = message.headers
        print("execute:", headers["Job-Status"], headers.get("Job-Exit-Code", "-"), flush=True)
        sys.stdout.buffer.write(message.data)
        return outcome.get("exit_code", 1)
    except NoRespondersError:
        print("nobody listens on functions.run: is worker-spawner running?", file=sys.stderr)
        return 1
    finally:
        await nc.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

"""Finds the workers as a NATS service, and has one of them run a command.

    python discover.py IMAGE [ARGUMENT ...]

NATS_URL names the server, nats://localhost:4222 by default.
Needs nats-py: pip install -r requirements.txt
"""

import asyncio
import json
import os
import sys

import nats
from nats.micro.service import ServiceInfo, ServiceStats, ServiceVerb, control_subject

SERVICE = "worker-spawner"


async def ask(nc, verb: ServiceVerb, read, patience: float = 1) -> list:
    """What every instance of the service answers within the patience."""
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox)
    await nc.publish(control_subject(verb, SERVICE), reply=inbox)
    found = []
    try:
        async with asyncio.timeout(patience):
            async for answer in answers.messages:
                # Where nobody listens the server says so, with an empty message.
                if answer.data:
                    found.append(read(json.loads(answer.data)))
    except TimeoutError:
        pass
    await answers.unsubscribe()
    return found


async def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    nc = await nats.connect(os.environ.get("NATS_URL", "nats://localhost:4222"))
    try:
        instances = await ask(nc, ServiceVerb.INFO, ServiceInfo.from_dict)
        if not instances:
            print("no such service: is worker-spawner running?", file=sys.stderr)
            return 1
        endpoints = {endpoint.name: endpoint for endpoint in instances[0].endpoints}
        print("endpoints:", *sorted(endpoints))

        # What a request may hold, the service says itself.
        run = endpoints["run"]
        fields = json.loads(run.metadata["request_schema"])["properties"]
        request = {"image_reference": sys.argv[1], "parameter": sys.argv[2:]}
        assert request.keys() <= fields.keys()
        reply = await nc.request(run.subject, json.dumps(request).encode(), timeout=60)
        outcome = json.loads(reply.data)
        print(outcome["stdout"], end="")

        stats = await ask(nc, ServiceVerb.STATS, ServiceStats.from_dict)
        served = sum(e.num_requests for s in stats for e in s.endpoints if e.name == "run")
        print("requests:", "some" if served else "none")
        return outcome.get("exit_code", 1)
    finally:
        await nc.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

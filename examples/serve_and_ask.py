# SPDX-License-Identifier: Apache-2.0
"""Start a server, ask it by OpenAI's client, let it call a tool, and end it.

python examples/serve_and_ask.py                        # the needle checkpoint: finds a number
python examples/serve_and_ask.py --checkpoint DIR       # a chat model: thinks, and calls a tool
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys

import openai
import tyro

from jaxcp.checkpoints import NEEDLE

TOOL = {
    "type": "function",
    "function": {
        "name": "temperature_of",
        "description": "The temperature of a city now, in degrees Celsius.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@dataclasses.dataclass
class Args:
    checkpoint: pathlib.Path = NEEDLE
    seq: int = 2  # shards; emulated where there are no accelerators
    question: str = "How warm is it in Moscow? Ask the tool."
    max_tokens: int = 256


@contextlib.contextmanager
def served(args):
    """The address of a server that runs until the end of the block."""
    command = [sys.executable, "-m", "jaxcp", "serve", "--port", "0", "--no-warm-up"]
    command += ["--checkpoint", str(args.checkpoint), "--seq", str(args.seq), "--name", "model"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        line = process.stdout.readline()  # once it takes requests
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit(process.wait() or 1)
        try:
            yield address.group()
        finally:
            process.send_signal(signal.SIGTERM)  # answers finish, and it exits with 0
    print("the server ended with", process.returncode)


def complete(client):
    prompt = "[key 4831 is 902714]\n[key 4831 is "
    answer = client.completions.create(model="model", prompt=prompt, max_tokens=6, temperature=0)
    print("answer:", answer.choices[0].text)


def talk(client, args):
    """Ask, and give the model what its tool says for as long as it calls it."""
    messages = [{"role": "user", "content": args.question}]
    for _ in range(4):
        answer = client.chat.completions.create(
            model="model", messages=messages, tools=[TOOL], max_tokens=args.max_tokens
        )
        message, usage = answer.choices[0].message, answer.usage
        print("thought:", getattr(message, "reasoning", None))
        print("answer:", message.content)
        print(f"{usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} known")
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            print("calls:", call.function.name, call.function.arguments)
            said = json.dumps({"celsius": -4})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
        if not message.tool_calls:
            return


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    with served(args) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        [model] = client.models.list()
        if model.chat:
            talk(client, args)
        else:
            complete(client)

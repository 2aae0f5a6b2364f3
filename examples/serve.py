"""Start a server on a checkpoint and ask it with the official client: several completions at once, one as a stream.

pip install 'flexmemory[serve]' openai
python examples/serve.py models/mini-flex3 "The history of the city" "In the year" "She said"
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys

import openai

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--tokens", type=int, default=24)
args = parser.parse_args()


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> str:
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=args.tokens, temperature=0.7, seed=1
    )
    return prompt + answer.choices[0].text


async def main(address: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        for text in await asyncio.gather(*(ask(client, model, prompt) for prompt in args.prompts)):
            print(text, end="\n---\n")
        stream = await client.completions.create(
            model=model, prompt=args.prompts[0], max_tokens=args.tokens, temperature=0, stream=True
        )
        async for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print()


command = [sys.executable, "-m", "flexmemory", "serve", args.checkpoint, "--port", "0"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
    try:
        assert server.stderr is not None
        for line in server.stderr:  # it says where it listens, on a port that was free
            if found := re.search(r"http://[\w.]+:\d+", line):
                asyncio.run(main(found[0]))
                break
        else:
            sys.exit("the server did not start")
    finally:
        server.terminate()

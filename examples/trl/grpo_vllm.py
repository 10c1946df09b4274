"""LoReFT in TRL's GRPOTrainer, with answers that a running vLLM samples.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --dtype float32 \\
        --additional-config '{"reft": ["block_output"]}'
    python examples/trl/grpo_vllm.py --model BASE

The server keeps the base; after each step it gets the trained edits, as an adapter under a name of
this step. It must be able to read the folder `versions`. Answers that name a word are rewarded.
"""

from grpo import train
from jsonargparse import auto_cli

from reftnoise.inference.vllm.rollouts import VllmRollouts


def main(
    model: str,
    server: str = "http://localhost:8000",
    data: str | None = None,
    word: str = "green",
    steps: int = 15,
    learning_rate: float = 4e-3,
    length: int = 10,
    name: str = "colours",
    versions: str = "versions",
    output: str | None = None,
) -> None:
    """Train, and print the mean reward of every step and where the time went.

    Args:
        model: directory or hub name of the base, which the server has, too.
        server: address of the server.
        data: a JSONL file.
        word: an answer that holds it gets the reward 1, another one 0.
        steps: of the optimizer, of 32 answers, 8 to a prompt.
        learning_rate: learning rate of AdamW, falling linearly to 0.
        length: greatest number of tokens of an answer.
        name: name of this run in the server.
        versions: folder for the adapter of the current step.
        output: where to save the adapter.
    """
    with VllmRollouts(server, versions, name=name) as rollouts:
        seconds = train(model, data, word, steps, learning_rate, length, output, rollouts)
    print(
        f"of {seconds:.1f} s: {rollouts.sampling_seconds / seconds:.0%} sampling, "
        f"{rollouts.sync_seconds / seconds:.1%} handing edits to the server"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

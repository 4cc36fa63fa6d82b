"""The command that torchrun runs: `torchrun mcore_sft/train.py --config FILE [key=value ...]`."""

from mcore_sft import command


def main() -> None:
    """Train the experiment of the command line."""
    arguments = command.parser("Packed dataset -> distributed checkpoints.").parse_intermixed_args()
    config = command.experiment(arguments)
    # Imported late: torch and Megatron-core take seconds, and a typo should cost none of them.
    from mcore_sft.training.loop import train

    train(config)


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    command.run(main)

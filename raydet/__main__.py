"""`python -m raydet` and `raydet`: the command, interruptible from its first import on."""

import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    try:
        from raydet.cli.main import main as run
    except KeyboardInterrupt:
        print("raydet: interrupted before the command started", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())

"""Runs ``semroute`` as ``python -m semantic_routing``, or in several processes as ``torchrun -m semantic_routing``."""

from semantic_routing.cli.main import main

if __name__ == "__main__":
    main()

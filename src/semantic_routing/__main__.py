"""``python -m semantic_routing`` is ``semroute``; ``torchrun -m semantic_routing`` starts it in several processes."""

from semantic_routing.cli.main import main

if __name__ == "__main__":
    main()

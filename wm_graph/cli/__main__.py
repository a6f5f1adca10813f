"""`python -m wm_graph.cli` is `wm`."""

from wm_graph.cli import main

if __name__ == "__main__":
    main()

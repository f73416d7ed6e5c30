"""`python -m avflow`: the same as the console command."""

from avflow.orchestrator.cli import main

if __name__ == "__main__":
    main()

"""The command line of awconv: ``python lightning_cli.py fit|validate|test|predict``."""

from awconv.cli import main

if __name__ == "__main__":
    main()

"""`python -m fleetctl` and the program `fleetctl`."""


def main() -> None:
    from fleetctl.cli.app import main as run

    run()


if __name__ == "__main__":
    main()

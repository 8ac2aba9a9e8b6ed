"""`python -m podferry.agent`."""

from podferry.agent.program import main

if __name__ == "__main__":
    main()

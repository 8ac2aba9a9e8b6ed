"""`python -m podferry.controller`."""

from podferry.controller.program import main

main()

"""`python3 -m podferry.images` is podferry-snapshotter."""

from podferry.images import main

main()

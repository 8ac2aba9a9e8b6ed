"""The evaluation: a plan of runs that is carried out unattended, and one report of them."""

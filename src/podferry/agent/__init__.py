"""podferry-agent: one per node; moves containers off it and onto it."""

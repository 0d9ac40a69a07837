"""The verbs of the ``kvedit`` command. A module holds one, or a few that belong together."""

"""Many runs of the stages, arms x seeds, and what they show together.

A door with rooms of its own: `plan` reads the config, `make` makes one run, `drive` makes all of them as processes,
`statistics` and `answer` say what they show, `page` shows it.
"""

"""What can break under a migration, done many times at random moments: `python -m tests.faults --runs 200`.

A guest that verifies its memory and its disk (witness.S) goes to and fro between two hosts of a testbed, each time by
`vmctl migrate`, and each time something breaks, in a phase that was chosen (phases.py, strikes.py). judge.py looks: the
VM runs on one host, never on two, with all that it wrote; nothing is left of it elsewhere; vmctl has said where it
is, and has ended; `--recover`, or a plain second run, finishes the job. What each run came to is a line of a file, by
which a series that was interrupted goes on.
"""

"""`python -m trainer.launch`: run a script once per accelerator."""

from trainer.launch.supervisor import leave_with, main

if __name__ == "__main__":
    leave_with(main)

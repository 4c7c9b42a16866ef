"""The paper's experiments (Sec. 4.4) as commands."""

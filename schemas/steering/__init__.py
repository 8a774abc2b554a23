"""The section, cases, tables and expectations of the experiment steering (PAPER 1.3)."""

"""The section, tables and expectations of the experiment pretraining (PAPER 1.4)."""

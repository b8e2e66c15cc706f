"""The paper's ablations: its variants trained side by side with several seeds, and a table with intervals."""

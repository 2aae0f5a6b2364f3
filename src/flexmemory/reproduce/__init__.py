"""The paper's study, at a size that can be trained here: one module per table or figure, and the page they make."""

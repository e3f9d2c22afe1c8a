"""The `workbench` program, one module a verb."""

"""What was measured, for readers: numbers, sentences, tables, pictures, and drift.html.

numbers          magnitudes, shifts and shares as text
findings         what may be said, in sentences
sections         a table and what it says, the same in the terminal, on the page and in drift.json
model_sections   those of a whole model and of a packed row
choice_sections  those of what can be chosen: a setting of `wrap`, a base, an extension method
draw             pictures; draw_sweep that of a sweep
page             drift.html
"""

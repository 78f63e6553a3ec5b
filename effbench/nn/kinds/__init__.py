"""What each kind of method promises, done with torch: one module a kind, named like it, with `apply(run, method)`.

`run.serve(method)` finds the module by the kind's name, so that what a method's result depends on is its own module and
this one, each with what they import, and not the services of other kinds.
"""

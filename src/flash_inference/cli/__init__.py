"""The command line: `flash-inference generate | score | verify | plan | tune | draw | bench | demo | doctor`."""

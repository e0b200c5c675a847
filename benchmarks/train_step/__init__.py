"""The parts of `dreambooth benchmark train`; `levers` holds what its fast step should gain."""

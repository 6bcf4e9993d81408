# %% [markdown]
# # Edit a model, and undo it
#
# A model gives a wrong answer. An edit fixes it, the other answers stay, and the edit is undone by its name.
# `atlas-facts`, a small language model that ships with the package, knows facts on cities; put your own in its place:
# a folder, or a hub id.

# %%
from grace_bench import EditableModel
from grace_bench.editors import Grace

model = EditableModel.from_pretrained("atlas-facts", task="completion", device="cpu")
prompts = [
    "Swords has as its country",  # what is edited
    "Swords is a town found in",  # the same fact in other words
    "Dublin is a city that lies in",  # another fact
]
unedited = model.answer(prompts)
print(unedited)

# %% [markdown]
# `grace` stores the edit beside the weights. `eps_init` is the distance within which an input counts as the edited
# one, in the units of the layer's inputs.

# %%
editor = Grace(model=model, eps_init=0.5, replacement="replace_last")
outcome = editor.edit_text(prompts[0], "Czechia", request_id="swords")
print(f"{outcome.steps} steps to a loss of {outcome.loss:.4f}")
edited = model.answer(prompts)
print(edited)

# %% [markdown]
# The edit holds and the other city is left alone. The other wording lies outside the radius; `docs/editors.md` says
# which editors find it.

# %%
editor.edit_text("Nauru has as its calling code", "262", request_id="nauru")
editor.undo("swords")
undone = model.answer([*prompts, "Nauru has as its calling code"])
print(undone)

# %% [markdown]
# The later edit stays. `editor.rollback()` undoes all of them, and `editor.export("folder")` writes what
# `load_edited` loads in another program.

# %%
editor.rollback()
print(model.answer(prompts) == unedited)

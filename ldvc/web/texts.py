"""The texts of the page's frame, of the input panel, and those that several tabs share."""

TITLE = "LDVC"
TAGLINE = "Type any class names. See which pixels they are, and which names each patch attends to."
ABOUT = (
    "Language-driven visual consensus: a frozen CLIP, prompts, and a small decoder. Patches first attend to similar patches "
    "(<em>local-consensus self-attention</em>, LCSA), then to the class names."
)
PAPER = "https://arxiv.org/abs/2403.08426"
PAPER_LABEL = "The paper"

# ---- input panel

PHOTO_LABEL = "Photo"
PHOTO_HINT = "Drop a photo here, paste one, or click to choose"
EXAMPLES_LABEL = "Or use an example"
NAMES_LABEL = "Class names"
NAMES_INFO = "English nouns, separated by commas; “sofa | couch” are two words for one class."
NAMES_PLACEHOLDER = "dog, grass, cat"
RUN = "Segment"
INDISTINGUISHABLE = "The model reads English nouns and cannot tell {names} apart. Which of them a pixel gets has no meaning."
STALE = "This is the answer to an older question. Press Segment."
CHIPS_LABEL = "Classes of the next question"
CHIPS_COUNT = "{all} classes; the model saw masks of {seen} in training."
REMOVE = "Remove {name}"
COPY_LINK = "Copy link"
LINK_COPIED = "The link to this answer is copied."
LINK_BLOCKED = "The browser does not allow copying here; the link is now in the address bar."
NO_LINK = "Only answers about examples have a link; your own photo is never shared."
VOCABULARY_LABEL = "Class lists"
OWN_NAMES = "My own names"
MODEL_LABEL = "Model"

# ---- problems

NO_PHOTO = "Choose a photo first, or use one of the examples."
NONE_NAMED = "{names} is no class: it allows “none of these”."
NONE_NAMED_MANY = "{names} are no classes: they allow “none of these”."
NO_SUCH_MODEL = "There is no such model; choose one of {names}."
FULL_DOWNLOAD = (
    "“full” is OpenAI’s CLIP. Choosing it for the first time downloads 599 MB: one minute at 100 Mbit/s, eight at 10."
)
LOADING = "“{model}” is being loaded. The first time takes up to a minute."
FULL_DOWNLOADING = "“full” is being downloaded: {done} of {total} MB."
FULL_WAIT = "Ask again when it is here, or choose lite until then."
FULL_OFFLINE = (
    "“full” needs OpenAI’s ViT-B/16 weights (599 MB), and the Hugging Face Hub cannot be reached: connect to the network and "
    "choose it again, or start the page with LDVC_CLIP_WEIGHTS=<file of the weights>. Until then, choose lite."
)
NO_GPU = "Lite answered, because the chosen model got no GPU. {reason}"
EXAMPLE_BY_LITE = "Lite answered at once. Press Segment to ask “{model}”, which borrows a GPU."
LINK_EXAMPLE = "The link names an example that is not here; choose one of those above."
LINK_NAMES = "The class names of the link could not be read; these are the example’s own."
LINK_MODEL = "The model of the link is not loaded here; the one that the page opens with answered."
FULL_FAILED = "The full model could not be loaded; choose it again to try again."
NO_THRESHOLD = "The threshold is a number from 0 to 1, not “{value}”."
NO_FLAG = "Whether “none of these” is allowed is true or false, not “{value}”."
NO_NAMES = "Class names are a text, or a list of texts, not {value}."
UNEXPECTED = (
    "An unexpected error occurred. Your input is unchanged. Please try again; if the error persists, try another photo."
)

EXPIRED = (
    "Your session has expired: the page no longer keeps your answer. "
    "Press Segment; if that does not help, choose the photo again."
)
BUSY = "The server is busy; please try again in a moment."
NOTHING_HERE = "There is nothing at this address."
NO_SPACE = "The server cannot store files at the moment; please try again later."
BAD_REQUEST = "The request could not be read; “Use via API” on the page shows what each endpoint takes."
REQUEST_TOO_LARGE = "The request is too large: a photo may have 50 MB; make it smaller and try again."
TOO_FEW_INPUTS = "The request has {count} inputs, and {wanted} are needed; “Use via API” on the page shows them."

# ---- what to look for in a tab

LOOK_FOR = {
    "segment": "Does each colour end where its object ends? Choose a name below the picture to see that class alone.",
    "attention": "The map of a name should be bright on its object and dark elsewhere. Compare the columns.",
    "routing": "Click on a patch: the regions that it was routed to should show the same kind of thing.",
    "space": "Watch the diamonds: LDVC leaves the names where they are, ZegCLIP’s decoder moves them.",
    "compare": "Patches of wrong classes should become fewer from plain CLIP to LDVC with LCSA.",
}

# ---- shared by tabs

DRAWING = "This is being computed for your photo and names."
SEEN = "seen"
UNSEEN = "unseen"
NONE_OF_THESE = "none of these"
DECODER_TITLES = {
    "clip": "Plain CLIP similarity",
    "zegclip": "ZegCLIP’s decoder",
    "ldvc_without_lcsa": "LDVC without LCSA",
    "ldvc": "LDVC with LCSA",
    "ldvc_lcsa_off": "LCSA switched off",
}
DECODER_MISSING = "There is no such decoder here."
DECODER_HOW = "This checkpoint has no such decoder: train it (docs/training.md) and put its folder beside the others."
DECODER_FAILED = "This decoder could not be fetched; press Segment to try again."
NO_DECODER = (
    "CLIP alone has no decoder: train one (docs/training.md), and start the page with LDVC_FULL=<its folder or Hub id>."
)
LAYER = "Layer"
HEAD = "Head"
MEAN = "mean"
COMPANY = "Company"

// The search of the site: how a query is read, and the scores of its results.

// Words that a question has and a page need not have.
const FILLERS = /\b(how|do|does|did|can|could|should|i|we|my|me|the|use|using|want|what|which|why|when|get|make|please)\b/g;
// Words of questions and the words of the pages, in the order of their replacement.
const SYNONYMS = [
  [/\b(multi|multiple|many|two|several)[- ]?(gpus?|devices?)\b/, "several gpus"],
  [/\b(multi|multiple)[- ]?(nodes?|hosts?)\b|\bdistributed( training)?\b/, "pods and clusters"],
  [/\b(own|custom|other|different) (unet|u-net|model|architecture|backbone)\b/, "own network"],
  [/\b(own|custom) loss( function)?\b/, "writing a loss"],
  [/\b(own|custom) sampler\b/, "writing a sampler"],
  [/\b((own|custom) (images?|photos?|pictures?|dataset|data set|data)|(train|training) on (photos?|pictures?|images?))$/, "your images"],
  [/\b(resume|continue|restart) (training|a run|run)\b|\bcheckpoints?$/, "resume"],
  [/\bimg2img\b/, "image to image"],
  [/\bcfg\b|\bclassifier[- ]free guidance\b/, "guidance scale"],
  [/\boom\b|\b(gpu|less|reduce) memory\b|\bgradient checkpointing\b/, "out of memory"],
  [/\b(mixed precision|fp16|bf16)\b/, "faster training"],
  [/\bdit\b/, "transformers dit"],
  [/\b(sample|sampling|generate|generation) (faster|quickly)\b|\bspeed up sampling\b/, "faster sampling"],
  [/\b(train|training) faster\b|\bspeed up training\b/, "faster training"],
  [/\b(finetun(e|ing)|fine tun(e|ing))\b/, "fine-tuning"],
  [/\b(wandb|weights (&|and) biases|mlflow|tensorboard)\b/, "trackers"],
  [/\bconditional (generation|sampling|diffusion)\b/, "conditional models"],
  [/\b(quick ?start|getting started|tutorials?)\b/, "start"],
  [/\binverse problems?\b/, "posterior sampling"],
  [/\bloss (is )?(not decreasing|stuck|plateaus?)\b/, "the loss does not fall"],
  [/\b(overfit(ting)?|memori[sz](e|ed|ing|ation))\b/, "copies of training images"],
  [/\b(hugging ?face|hub)\b/, "weights by name"],
  [/\btime series\b/, "series"],
  [/\b(stable diffusion|text[- ]?to[- ]?image|txt2img|text encoder|prompts?)\b/, "text to image"],
];
let words = [];

const parseQuery = Search._parseQuery;
Search._parseQuery = (query) => {
  let text = query.toLowerCase().replace(FILLERS, " ").replace(/\?/g, " ").replace(/\s+/g, " ").trim() || query;
  for (const [pattern, replacement] of SYNONYMS) text = text.replace(pattern, replacement);
  const parsed = parseQuery(text);
  words = [...parsed[1]];
  return parsed;
};

// A heading that has the whole query comes first, then pages with words of the query in the title, guides, and other pages.
// The numbers of the object are Sphinx's defaults, which an own object must repeat.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, , , score, , kind]) => {
    if (kind === SearchResultKind.title) return score + 10;
    if (kind !== SearchResultKind.text) return score;
    const bonuses = { "guides/": 4, "start/": 3, "concepts/": 2, "reference/api/": -3, "contributing/": -3 };
    const folder = Object.keys(bonuses).find((folder) => page.startsWith(folder));
    const inTitle = words.filter((word) => title.toLowerCase().includes(word)).length;
    return score + (bonuses[folder] ?? 0) + 3 * inTitle;
  },
};

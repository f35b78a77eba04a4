// Scores of Sphinx's search. A heading that has the whole query comes first, then guides, then other pages.
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
  score: ([page, , , , score, , kind]) => {
    if (kind === SearchResultKind.title) return score + 10;
    if (kind !== SearchResultKind.text) return score;
    const bonuses = { "guides/": 4, "start/": 3, "concepts/": 2, "reference/api/": -3, "contributing/": -3 };
    const folder = Object.keys(bonuses).find((folder) => page.startsWith(folder));
    return score + (bonuses[folder] ?? 0);
  },
};

// What scrolls sideways has to be reached by keys, too, and the bars with copy buttons have to have names of their own.
const reachable = () => {
  for (const each of document.querySelectorAll("pre code, .md-typeset__scrollwrap")) each.tabIndex = 0;
  document.querySelectorAll("nav.md-code__nav").forEach((bar, index) => (bar.ariaLabel = `Code ${index + 1}`));
};
document.addEventListener("DOMContentLoaded", () => {
  reachable();
  new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
});

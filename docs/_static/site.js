// The sidebar's buttons that open a folder have only an arrow: a name for screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-sidebar-primary summary")) {
    const link = summary.closest("li")?.querySelector("a");
    summary.setAttribute("aria-label", `Pages of ${link?.textContent.trim() ?? "this folder"}`);
  }
});

// An equation that is wider than the page scrolls: the keyboard must reach it.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const equation of document.querySelectorAll("mjx-container[display='true']")) {
    if (equation.scrollWidth > equation.clientWidth) {
      equation.tabIndex = 0;
      equation.setAttribute("role", "group");
      equation.setAttribute("aria-label", "Equation, scrolls sideways");
    }
  }
});

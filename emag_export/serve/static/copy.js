// Text to the clipboard, or into a window from which it can be copied by hand.

/**
 * Copy a text and say so in the status line.
 *
 * @param {string} text
 * @param {string} what Its name, for people.
 */
export async function copyText(text, what) {
  const status = document.getElementById("status");
  try {
    // There is no clipboard for a page that came over plain HTTP from another machine.
    await navigator.clipboard.writeText(text);
    status.textContent = `The ${what} is in the clipboard.`;
  } catch {
    const area = document.getElementById("copy-text");
    document.getElementById("copy-title").textContent = `Copy this ${what}`;
    area.value = text;
    document.getElementById("copy-dialog").showModal();
    area.focus();
    area.select();
  }
}
